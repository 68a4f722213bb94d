"""What a mask file means: the forms that programs and people save, and those that could mean two things."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from asymvq_jax.errors import ImageError, MaskError
from asymvq_jax.files.masks import HAZE, generated, load_mask, percent, read_mask_size, reduce_mask, turned
from asymvq_jax.files.pictures import read_picture

REGION = np.zeros((40, 60), bool)
REGION[8:20, 10:40] = True
WHITE = REGION.astype(np.uint8) * 255
PHOTO = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).repeat(8, 0)[:40].repeat(10, 1).astype(np.uint8)


def _rgba(colour, alpha):
    return np.dstack([np.broadcast_to(colour, (*REGION.shape, 3)), alpha]).astype(np.uint8)


def _labels():
    image = Image.fromarray(REGION.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    return image


STROKES = {name: np.where(REGION[..., None], colour, 0).astype(np.uint8)
           for name, colour in (("red", (255, 0, 0)), ("green", (0, 200, 30)), ("yellow", (255, 255, 0)))}  # fmt: skip
UNDERSTOOD = {
    "white on black": (WHITE, "brightness"),
    "one bit": (Image.fromarray(WHITE).convert("1"), "brightness"),
    "0 and 1": (REGION.astype(np.uint8), "brightness (0 and 1 as black and white)"),
    "0 and 1 in 16 bits": (REGION.astype(np.uint16), "brightness (0 and 1 as black and white)"),
    "0 and 255 in 16 bits": (WHITE.astype(np.uint16), None),
    "0 and 65535": (REGION.astype(np.uint16) * 65535, "brightness"),
    "labels with a palette": (_labels(), "red on black"),
    "red": (STROKES["red"], "red on black"),
    "green": (STROKES["green"], "green on black"),
    "yellow": (STROKES["yellow"], "yellow on black"),
    "white on transparent": (_rgba(255, WHITE), "alpha (white strokes on transparency)"),
    "red on transparent": (_rgba((255, 0, 0), WHITE), "alpha (red strokes on transparency)"),
    "erased": (np.dstack([PHOTO, 255 - WHITE]), "alpha (erased where transparent)"),
    "grey and alpha": (Image.fromarray(np.dstack([WHITE, WHITE | 200]), "LA"), None),
}


def _save(path, array):
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", UNDERSTOOD)
@pytest.mark.parametrize("soft", [False, True])
def test_understood(tmp_path, name, soft):
    array, source = UNDERSTOOD[name]
    mask = load_mask(_save(tmp_path / "m.png", array), soft=soft)
    assert mask.values.shape == (*REGION.shape, 1)
    assert mask.values.dtype == (np.float32 if soft else np.uint8)
    np.testing.assert_array_equal(mask.values[..., 0] > 0.5, REGION)
    assert set(np.unique(mask.values)) == {0, 1}
    assert source is None or mask.source == source
    assert mask.describe() == f"mask from {mask.source}, 15% generated"
    assert mask.warning("m") == ""
    inverted = load_mask(tmp_path / "m.png", soft=soft, invert=True)
    np.testing.assert_array_equal(inverted.values, 1 - mask.values)
    assert inverted.source.endswith(", inverted")


def test_floating_point(tmp_path):
    tifffile.imwrite(tmp_path / "m.tif", REGION.astype(np.float32))
    np.testing.assert_array_equal(load_mask(tmp_path / "m.tif").values[..., 0], REGION)
    tifffile.imwrite(tmp_path / "m.tif", WHITE.astype(np.float32))
    with pytest.raises(ImageError, match=r"expected 0 \(black\) to 1"):
        load_mask(tmp_path / "m.tif")


def test_a_jpeg_s_black_and_white(tmp_path):
    image = Image.fromarray(np.repeat(cv2.GaussianBlur(WHITE, (0, 0), 1)[..., None], 3, -1))
    image.save(tmp_path / "m.jpg", quality=60)
    mask = load_mask(tmp_path / "m.jpg")
    assert mask.source == "brightness"
    assert (mask.values[..., 0] != REGION).mean() < 0.05
    Image.fromarray(WHITE // 255).save(tmp_path / "dark.jpg", quality=95)
    assert load_mask(tmp_path / "dark.jpg").empty


def test_a_blurred_edge_has_few_values_and_no_labels(tmp_path):
    edge = cv2.GaussianBlur(WHITE, (3, 3), 0)
    assert 2 < len(np.unique(edge)) <= 16
    np.testing.assert_array_equal(load_mask(_save(tmp_path / "m.png", edge)).values[..., 0], edge >= 128)


@pytest.mark.parametrize(
    "array",
    [
        REGION,
        REGION[None],
        REGION[..., None].astype(np.float32),
        WHITE,
        REGION.astype(np.int64),
        REGION.astype(np.float16),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_of_segmentation_models(tmp_path, array):
    np.save(tmp_path / "m.npy", array)
    np.testing.assert_array_equal(load_mask(tmp_path / "m.npy").values[..., 0], REGION)
    assert read_mask_size(tmp_path / "m.npy") == REGION.shape


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.stack([REGION, REGION]), "of shape .2, 40, 60.: expected one plane"),
        (REGION * 700.0, "floating-point pixels from 0 to 700"),
        (REGION * -1, "array of int64: expected bool"),
        (np.array([["a", "b"], ["c", "d"]]), "expected bool"),
        (np.array([[None]]), "not a readable NumPy array"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(MaskError, match=rf"^mask .*m\.npy .*{message}"):
        load_mask(tmp_path / "m.npy")


def test_a_mask_that_was_not_turned_with_its_picture_is_told(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(tmp_path / "photo.jpg", exif=exif)
    _save(tmp_path / "m.png", WHITE)
    sizes = read_mask_size(tmp_path / "m.png"), read_picture(tmp_path / "photo.jpg").size
    assert "EXIF" in turned(*sizes)
    assert turned(sizes[0], sizes[0]) == turned((8, 8), (8, 8)) == turned((8, 9), (9, 9)) == ""


AMBIGUOUS = {
    "alpha of a black picture": (_rgba(0, WHITE), "black with a varying alpha.*--mask-channel alpha"),
    "a picture": (PHOTO, "a picture of .* colours or more, not a mask"),
    "strokes over a picture": (np.where(REGION[..., None], (255, 0, 0), PHOTO).astype(np.uint8), "not a mask"),
    "two colours": (np.dstack([WHITE, 0 * WHITE, (WHITE[::-1] * ~REGION)]), "not a mask"),
    "ones": (np.ones_like(WHITE), "the value 1 everywhere"),
    "labels": (np.where(REGION, 1, np.where(REGION[::-1], 255, 0)).astype(np.uint8), "the values 0, 1, 255, as labels"),
    "dim": (cv2.GaussianBlur(WHITE, (0, 0), 2) // 3, "no value above half"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous(tmp_path, name):
    array, message = AMBIGUOUS[name]
    with pytest.raises(MaskError, match=rf"^mask .*m\.png .*{message}"):
        load_mask(_save(tmp_path / "m.png", array))


def test_a_channel_that_is_named_is_taken(tmp_path):
    _save(tmp_path / "black.png", _rgba(0, WHITE))
    np.testing.assert_array_equal(load_mask(tmp_path / "black.png", channel="alpha").values[..., 0], REGION)
    np.testing.assert_array_equal(
        load_mask(tmp_path / "black.png", channel="alpha", invert=True).values[..., 0], ~REGION
    )
    both = np.dstack([WHITE, WHITE[::-1], 0 * WHITE])
    _save(tmp_path / "two.png", both)
    for channel, expected in (("red", REGION), ("green", REGION[::-1]), ("blue", 0 * REGION)):
        np.testing.assert_array_equal(load_mask(tmp_path / "two.png", channel=channel).values[..., 0], expected)
    with pytest.raises(MaskError, match="has no alpha channel"):
        load_mask(tmp_path / "two.png", channel="alpha")
    with pytest.raises(MaskError, match="expected one of grey, red"):
        load_mask(tmp_path / "two.png", channel="hue")


def test_black_and_white_masks_are_told(tmp_path):
    for value, message in ((0, "is black: nothing is generated"), (255, "is white everywhere: nothing")):
        mask = load_mask(_save(tmp_path / "m.png", np.full_like(WHITE, value)))
        assert message in mask.warning("m.png")
        assert (mask.empty, mask.full) == (value == 0, value == 255)
    haze = load_mask(_save(tmp_path / "m.png", np.where(REGION, 2, 1).astype(np.uint8)), soft=True)
    assert haze.empty
    assert haze.values.max() < HAZE
    grey = load_mask(_save(tmp_path / "m.png", np.linspace(0, 255, 2400).reshape(40, 60).astype(np.uint8)))
    assert "neither black nor white in most places" in grey.warning("m.png")


def test_share_of_small_and_large_masks():
    values = np.zeros((1000, 1000, 1), np.uint8)
    values[:3, :100] = 1
    assert [percent(x) for x in (values, 1 - values, values * 0, values * 0 + 1)] == ["0.03%", "99.97%", "0%", "100%"]


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (64, 64), (100, 3), (1, 1)])
def test_any_masked_pixel_counts_in_a_reduced_mask(size):
    for place in ((0, 0), (13, 40), (63, 63), (31, 32)):
        mask = np.zeros((2, 64, 64, 1), np.uint8)
        mask[0][place] = 1
        small = reduce_mask(mask, size)
        assert small.shape == (2, *size, 1)
        assert small[0].any()
        assert not small[1].any()
        # Near where it was, by the size of a reduced pixel.
        found = np.argwhere(small[0, ..., 0]) * (64 / np.array(size))
        assert np.abs(found - place).max() <= 64 / min(size) + 1


def test_the_maximum_of_soft_values():
    mask = np.random.default_rng(0).random((16, 24, 1)).astype(np.float32)
    np.testing.assert_array_equal(reduce_mask(mask, (2, 3))[..., 0], mask.reshape(2, 8, 3, 8).max((1, 3)))


@pytest.mark.parametrize("kind", [bool, np.uint8, np.float32, np.float64])
def test_the_threshold_is_the_same_for_every_type(kind):
    hard = np.array([0, 1, 1, 0]).reshape(2, 2, 1).astype(kind)
    np.testing.assert_array_equal(generated(hard), hard.astype(bool))
    if kind not in (bool, np.uint8):
        greys = np.array([0.0, np.nextafter(kind(0.5), kind(0)), 0.5, 1.0]).reshape(2, 2, 1).astype(kind)
        np.testing.assert_array_equal(generated(greys).ravel(), [False, False, True, True])
