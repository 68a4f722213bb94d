"""Crop and stitch: the region, what the model sees of it, and a picture whose other pixels are its own."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from asymvq_jax.commands.inpaint import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.files.metadata import Metadata
from asymvq_jax.files.pictures import Picture, read_picture, write_picture
from asymvq_jax.inference import Crop, inpaint, inpaint_picture
from asymvq_jax.inference.blend import BLENDS, MIXING
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model

SIZES = {"encoder_channels": (8, 8, 8), "decoder_channels": (8, 8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
CONFIG = ModelConfig(**SIZES, norm_groups=4)


@pytest.fixture(scope="module")
def model():
    return Autoencoder(CONFIG, rngs=nnx.Rngs(0))


def picture(height=90, width=120):
    """Noise, and a mask in it."""
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width, 1), np.uint8)
    mask[30:46, 50:74] = 1
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8), mask


@pytest.mark.parametrize(
    ("box", "context", "expected"),
    [
        # (top, bottom, left, right) -> top, left, height, width, working size
        ((30, 46, 50, 74), 1.5, (20, 44, 36, 36, (32, 32))),
        ((0, 16, 0, 24), 1.5, (0, 0, 36, 36, (32, 32))),
        ((74, 90, 100, 120), 2, (50, 80, 40, 40, (32, 32))),
        # A long mask: the picture cuts the square.
        ((40, 50, 5, 115), 1.5, (0, 0, 90, 120, (24, 32))),
        # A point has the latent's surroundings.
        ((40, 41, 60, 61), 1, (36, 56, 9, 9, (32, 32))),
        ((0, 0, 0, 0), 1.5, (0, 0, 90, 120, (24, 32))),
    ],
)
def test_the_region_surrounds_the_mask(box, context, expected):
    mask = np.zeros((90, 120, 1), np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 1
    region = Crop(context, 32).region(mask, 4)
    assert (region.top, region.left, region.height, region.width, region.work) == expected
    assert region.of(mask).sum() == mask.sum()


@pytest.mark.parametrize("work", [20, 64])
def test_a_mask_of_one_pixel_or_one_line_is_never_lost(work):
    for place in ((slice(40, 41), slice(60, 61)), (slice(40, 41), slice(3, 117)), (slice(5, 80), slice(9, 10))):
        mask = np.zeros((90, 120, 1), np.uint8)
        mask[place] = 1
        region = Crop(1.5, work).region(mask, 4)
        seen = region.enter_mask(mask)[..., 0] > 0
        # A line is one from end to end.
        for axis, (whole, length) in enumerate(zip(region.work, region.size, strict=True)):
            places = np.flatnonzero(seen.any(1 - axis))
            drawn = mask[..., 0].any(1 - axis).sum() * whole / length
            assert drawn - 1 <= len(places) <= drawn + 2
            np.testing.assert_array_equal(np.diff(places), 1)


@pytest.mark.parametrize("work", [16, 36, 96])
def test_kept_pixels_of_every_kind_are_exact(model, work):
    rng = np.random.default_rng(1)
    _, mask = picture()
    for kind, channels in ((np.uint8, 3), (np.uint16, 3), (np.uint8, 1)):
        white = np.iinfo(kind).max
        stored = rng.integers(0, white, (90, 120, channels + 1), endpoint=True).astype(kind)
        for alpha in (None, stored[..., channels:]):
            whole = Picture(stored[..., :channels], alpha, Metadata(dpi=(300, 300)))
            done = inpaint_picture(model, whole, mask, crop=Crop(1.5, work))
            kept = mask[..., 0] == 0
            np.testing.assert_array_equal(done.picture.colour[kept], whole.colour[kept])
            assert done.picture.colour.dtype == kind
            assert (done.picture.colour[~kept] != whole.colour[~kept]).mean() > 0.5
            assert done.picture.metadata == whole.metadata
            assert done.region.work == (work, work)
            if alpha is not None:
                np.testing.assert_array_equal(done.picture.alpha[kept], alpha[kept])
                assert (done.picture.alpha[~kept] == white).all()


def test_at_its_own_size_the_region_is_a_picture_like_any_other(model):
    image, mask = picture()
    part = slice(20, 56), slice(44, 80)
    alone = inpaint(model, image[part], mask[part], keep="exact", blend="none")
    stitched = inpaint(model, image, mask, crop=Crop(1.5, 36))
    np.testing.assert_array_equal(stitched.image[part], alone.image)
    assert stitched.tone_step == alone.tone_step
    latent = np.zeros((4, 9, 9), np.float32)
    edited = inpaint(model, image, mask, latent, crop=Crop(1.5, 36), scaled=True)
    assert (edited.image != stitched.image).any()
    with pytest.raises(InputError, match=r"expected \(4, 9, 9\)"):
        inpaint(model, image, mask, latent[:, 1:], crop=Crop(1.5, 36))


@pytest.mark.parametrize("blend", BLENDS)
def test_a_blend_reaches_no_farther_than_its_band(model, blend):
    image, mask = picture()
    done = inpaint(model, image, mask, crop=Crop(2, 36), blend=blend, band=3 if blend in MIXING else None).image
    changed = (done != image).any(-1)
    reach = 3 if blend in MIXING else 0
    allowed = np.zeros_like(changed)
    allowed[30 - reach : 46 + reach, 50 - reach : 74 + reach] = True
    assert not (changed & ~allowed).any()
    assert changed[32:44, 52:72].any()


def test_wrong_values_are_named(model):
    image, mask = picture()
    for values, message in (((0.9, 32), "context 0.9"), ((1.5, 0), "work size 0"), ((1.5, 34), "a multiple of 4")):
        with pytest.raises(InputError, match=message):
            inpaint(model, image, mask, crop=Crop(*values))
    with pytest.raises(InputError, match="keep='model' does not go with crop"):
        inpaint(model, image, mask, keep="model", crop=Crop())


def test_command_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", model)
    image, mask = picture()
    write_picture("image.png", Picture(image))
    Image.fromarray(mask[..., 0] * 255).save("mask.png")
    files = ["--image=image.png", "--mask=mask.png", "--checkpoint=model", "--out=out.png"]
    assert main([*files, "--crop-and-stitch", "--context=2", "--work-size=32"]) == 0
    said = capsys.readouterr()
    assert "region of 48 x 48 px at 38, 14, filled at 32 x 32 px" in said.err
    assert "tone step at the edge: " in said.out
    out = read_picture("out.png").colour
    np.testing.assert_array_equal(out[mask[..., 0] == 0], image[mask[..., 0] == 0])
    assert (out != image).any()
    for options, message in (
        (["--crop-and-stitch", "--keep=model"], "does not go with --crop-and-stitch"),
        (["--crop-and-stitch", "--context=0"], "expected 1 to 100"),
        (["--crop-and-stitch", "--out=o.jpg"], "JPEG changes every pixel"),
        (["--work-size=256"], "belong to --crop-and-stitch, which is missing"),
    ):
        assert main([*files, *options]) == 2
        assert message in capsys.readouterr().err
