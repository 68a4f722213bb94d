"""Reading pictures of every kind, decoding at every size, inpainting, and the command line's messages."""

import io
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from asymvq_jax import inference
from asymvq_jax.commands.inpaint import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import convert
from asymvq_jax.errors import InputError, OutputError
from asymvq_jax.files import images
from asymvq_jax.files.metadata import Metadata
from asymvq_jax.files.pictures import Picture, read_picture, write_picture
from asymvq_jax.inference import decode, encode, inpaint, paste, read_latent, ways_of_keeping
from asymvq_jax.inference.blend import composite
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, save_model

CONFIG = ModelConfig(encoder_channels=(32, 32, 32), decoder_channels=(32, 32, 32), encoder_blocks=1, decoder_blocks=1)


@pytest.fixture(scope="module")
def model():
    return Autoencoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(path, model)
    return str(path)


def _picture(height=37, width=51):
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width, 1), np.float32)
    mask[10:20, 12:30] = 1
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8), mask


def _bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_mode_is_read_as_rgb():
    grey = Image.new("L", (4, 3), 100)
    assert (images.decode(_bytes(grey)) == 100).all()
    assert images.decode(_bytes(grey)).shape == (3, 4, 3)
    wide = Image.fromarray(np.full((3, 4), 51400, np.uint16))
    assert (images.decode(_bytes(wide)) == 200).all()
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    assert (images.decode(_bytes(clear)) == 255).all()
    palette = Image.new("RGB", (4, 3), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert (images.decode(_bytes(palette)) == (10, 20, 30)).all()
    cmyk = Image.new("CMYK", (4, 3), (0, 0, 0, 0))
    assert (images.decode(_bytes(cmyk, "JPEG")) > 250).all()


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(_bytes(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


def test_unreadable_pictures_are_named(tmp_path):
    data = _bytes(Image.fromarray(_picture()[0]))
    for broken in (b"", b"text", data[: len(data) // 2]):
        with pytest.raises(images.ImageError, match=r"a\.png is not a readable picture"):
            images.decode(broken, "a.png")
    with pytest.raises(images.ImageError, match="no picture at"):
        images.read(tmp_path / "none.png")
    with pytest.raises(OutputError, match="ends in one of"):
        images.write(tmp_path / "a.bmp", _picture()[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"a\.png cannot be written"):
        images.write(tmp_path / "file" / "a.png", _picture()[0])


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_files_keep_every_bit(tmp_path, kind):
    image, _ = _picture()
    images.write(tmp_path / f"a.{kind}", image)
    np.testing.assert_array_equal(images.read(tmp_path / f"a.{kind}"), image)


def test_float_and_back_is_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(images.to_uint8(images.to_float(levels)), levels)


def test_any_size_is_the_padded_picture_cropped(model):
    image, mask = _picture()
    pixels = images.to_float(image)[None]
    latent = encode(model, pixels)
    assert latent.shape == (1, 10, 13, 4)
    result = decode(model, latent, pixels, mask[None])
    assert result.shape == (1, 37, 51, 3)
    padded = np.pad(np.asarray(pixels), ((0, 0), (0, 3), (0, 1), (0, 0)), mode="edge")
    wide = np.pad(mask[None], ((0, 0), (0, 3), (0, 1), (0, 0)), mode="edge")
    expected = model.decode(model.encode(padded).mode(), padded, wide)[:, :37, :51]
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_latents_of_every_layout_and_scale(model):
    z = np.random.default_rng(0).normal(size=(10, 13, 4)).astype(np.float32)
    for array in (z, z[None], z.transpose(2, 0, 1), z.transpose(2, 0, 1)[None]):
        np.testing.assert_array_equal(read_latent(array, CONFIG, (37, 51), scaled=False)[0], z)
    np.testing.assert_allclose(read_latent(z * 0.18215, CONFIG, (37, 51))[0], z, rtol=1e-5)
    with pytest.raises(InputError, match=re.escape("the latent has shape (9, 13, 4): expected (4, 10, 13) or")):
        read_latent(z[:9], CONFIG, (37, 51))
    with pytest.raises(InputError, match="not finite"):
        read_latent(z * np.nan, CONFIG, (37, 51))


def test_the_own_latent_and_the_same_one_given_agree(model):
    image, mask = _picture()
    own = inpaint(model, image, mask)
    latent = np.asarray(encode(model, images.to_float(image)[None]))
    np.testing.assert_array_equal(own.image, inpaint(model, image, mask[..., 0], latent, scaled=False).image)
    assert own.tone_step is None
    changed = inpaint(model, image, mask, latent + 1, scaled=False)
    assert (changed.image != own.image).any()


@pytest.mark.parametrize("band", [0, 5])
def test_keep_exact_is_bit_equal_outside_the_band(model, band):
    image, mask = _picture()
    made = inpaint(model, image, mask).image
    kept = inpaint(model, image, mask, keep="exact", band=band)
    ys, xs = np.indices(mask.shape[:2])
    distance = np.hypot(np.maximum(np.maximum(10 - ys, ys - 19), 0), np.maximum(np.maximum(12 - xs, xs - 29), 0))
    np.testing.assert_array_equal(kept.image[distance > band], image[distance > band])
    np.testing.assert_array_equal(kept.image[distance == 0], made[distance == 0])
    covered = (distance > 0) & (distance <= max(band, 1))
    expected = np.abs(made.astype(float) - image.astype(float))[covered].mean()
    np.testing.assert_allclose(kept.tone_step, expected, rtol=1e-5)


def test_how_pixels_are_kept_by_default():
    """Exactly, and all of them, unless something that changes kept pixels is asked for."""
    assert ways_of_keeping() == ("model", "none", 8)
    assert ways_of_keeping("exact") == ways_of_keeping(blend="none") == ("exact", "none", 8)
    assert ways_of_keeping(exact="--crop-and-stitch") == ("exact", "none", 8)
    assert ways_of_keeping(band=3) == ("exact", "feather", 3)
    assert ways_of_keeping(blend="multiband", band=0) == ("exact", "multiband", 0)
    assert ways_of_keeping("model", "none") == ("model", "none", 8)
    for keep, blend, band, message in (
        ("model", "tone", None, "does not go with blend=tone"),
        ("model", None, 3, "does not go with band=3"),
        (None, "tone", 3, "band=3 has no effect with blend=tone: expected blend feather or multiband"),
        (None, None, -1, "expected zero or more"),
    ):
        with pytest.raises(InputError, match=message):
            ways_of_keeping(keep, blend, band)
    with pytest.raises(InputError, match="does not go with --edits"):
        ways_of_keeping("model", exact="--edits")


@pytest.mark.parametrize("blend", ["none", "tone", "poisson", "multiband"])
def test_keep_exact_sets_the_fill_in_by_the_blend_named(model, blend):
    image, mask = _picture()
    pixels = images.to_float(image)[None]
    # Where only masked pixels are used, one pixel of the latent around them is decoded without the picture.
    margin = 0 if blend == "multiband" else 4
    made = images.to_uint8(decode(model, encode(model, pixels), pixels, mask[None], margin=margin)[0])
    kept = inpaint(model, image, mask, keep="exact", blend=blend)
    np.testing.assert_array_equal(kept.image, composite(made, image, mask, blend))
    assert (kept.image != inpaint(model, image, mask, keep="exact", blend="feather").image).any()
    if blend != "multiband":
        np.testing.assert_array_equal(kept.image[mask[..., 0] == 0], image[mask[..., 0] == 0])


def test_a_margin_is_a_larger_mask_and_nothing_without_one(model):
    image, mask = _picture(40, 52)
    pixels = images.to_float(image)[None]
    latent = encode(model, pixels)
    larger = np.zeros_like(mask)
    larger[7:23, 9:33] = 1
    np.testing.assert_allclose(
        decode(model, latent, pixels, mask[None], margin=3), decode(model, latent, pixels, larger[None]), atol=1e-5
    )
    np.testing.assert_array_equal(decode(model, latent, margin=3), decode(model, latent))


def test_the_transition_is_monotone():
    mask = np.zeros((1, 20, 1), np.float32)
    mask[:, :5] = 1
    result = paste(np.zeros((1, 20, 3), np.uint8), np.full((1, 20, 3), 200, np.uint8), mask, 6).image[0, :, 0]
    assert (np.diff(result.astype(int)) >= 0).all()
    assert len(set(result[5:12].tolist())) > 5


def test_bad_arguments_are_named(model):
    image, mask = _picture()
    with pytest.raises(InputError, match="the mask is 50 x 37 px and the picture 51 x 37 px"):
        inpaint(model, image, mask[:, :50])
    with pytest.raises(InputError, match=r"mask has values from 0\.0 to 255\.0"):
        inpaint(model, image, mask * 255)
    plain = Autoencoder(ModelConfig(**{**vars(CONFIG), "condition": False}), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="no condition branch"):
        inpaint(plain, image, mask)


def test_command_line_inpaints(tmp_path, checkpoint, capsys):
    image, mask = _picture()
    images.write(tmp_path / "image.png", image)
    Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    model = load_model(checkpoint)
    latent = np.asarray(encode(model, images.to_float(image)[None]))[0] * 0.18215
    np.save(tmp_path / "latent.npy", latent.transpose(2, 0, 1))
    paths = [f"--{name}={tmp_path / name}.png" for name in ("image", "mask")]
    common = [*paths, f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out.png'}"]
    assert main(common) == 0
    own = images.read(tmp_path / "out.png")
    np.testing.assert_array_equal(own, inpaint(model, image, mask).image)
    convert(checkpoint, tmp_path / "original.safetensors", "ldm")
    assert main([*paths, f"--checkpoint={tmp_path / 'original.safetensors'}", f"--out={tmp_path / 'same.png'}"]) == 0
    np.testing.assert_array_equal(images.read(tmp_path / "same.png"), own)
    assert main([*common, f"--latent={tmp_path / 'latent.npy'}", "--keep=exact", "--band=3"]) == 0
    assert "tone step at the edge: " in capsys.readouterr().out
    np.testing.assert_array_equal(images.read(tmp_path / "out.png")[30:], image[30:])
    assert main([*common, "--keep=exact", "--blend=poisson"]) == 0
    expected = inpaint(model, image, mask, keep="exact", blend="poisson").image
    np.testing.assert_array_equal(images.read(tmp_path / "out.png"), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "none.png"}, "no picture at"),
        ({"mask": "small.png"}, "the mask is 5 x 5 px and the picture 51 x 37 px"),
        ({"checkpoint": "nowhere"}, "no checkpoint at nowhere"),
        ({"checkpoint": "."}, "holds no model checkpoint"),
        ({"out": "out.gif"}, "ends in one of .png, .jpg, .jpeg, .webp"),
        ({"out": "out.jpg", "keep": "exact"}, "--out out.jpg: JPEG changes every pixel; --keep exact needs"),
        ({"latent": "image.png"}, "latent image.png is a picture (PNG), not a latent"),
        ({"latent": "wrong.npy"}, "the latent has shape (4, 2, 2)"),
    ],
)
def test_command_line_messages(tmp_path, checkpoint, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    image, mask = _picture()
    images.write("image.png", image)
    Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).save("mask.png")
    Image.new("L", (5, 5)).save("small.png")
    np.save("wrong.npy", np.zeros((4, 2, 2), np.float32))
    options = {"image": "image.png", "mask": "mask.png", "checkpoint": checkpoint, "out": "out.png"} | changes
    assert main([f"--{name}={value}" for name, value in options.items()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_pad_repeats_the_edge():
    padded = inference.pad(jnp.arange(6.0).reshape(1, 2, 3, 1), 4)
    assert padded.shape == (1, 4, 4, 1)
    np.testing.assert_array_equal(padded[0, :, :, 0], [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]])


@pytest.fixture
def files(tmp_path, checkpoint, monkeypatch):
    """A picture of 16 bits with alpha and a resolution, and a mask, as options of the command."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(4)
    array = rng.integers(0, 65536, (37, 51, 4)).astype(np.uint16)
    array[..., 3] = 65535
    array[:, 40:, 3] = 20000
    write_picture("image.png", Picture(array[..., :3], array[..., 3:], Metadata(dpi=(300, 300))))
    Image.fromarray((_picture()[1][..., 0] * 255).astype(np.uint8)).save("mask.png")
    return ["--image=image.png", "--mask=mask.png", f"--checkpoint={checkpoint}", "--out=out.png"]


def test_command_line_keeps_all_of_a_picture(files, capsys):
    assert main([*files, "--keep=exact", "--band=2"]) == 0
    before, after = read_picture("image.png"), read_picture("out.png")
    kept = np.ones(before.size, bool)
    kept[7:23, 9:33] = False
    np.testing.assert_array_equal(after.colour[kept], before.colour[kept])
    np.testing.assert_array_equal(after.alpha, before.alpha)
    assert after.colour.dtype == np.uint16
    assert (after.colour[12:18, 14:28] != before.colour[12:18, 14:28]).any()
    np.testing.assert_allclose(after.metadata.dpi, 300, atol=1)
    assert "mask from brightness, 10% generated" in capsys.readouterr().out
    assert main([*files, "--out=out.webp"]) == 0
    said = capsys.readouterr().err
    assert "warning: WEBP holds 8 bits a channel" in said


def test_a_mask_that_the_decoder_would_lose_is_told(files, capsys):
    thin = np.zeros((37, 51), np.uint8)
    thin[5, 3:40] = thin[20:24, 20:24] = thin[30, 41] = 255
    Image.fromarray(thin).save("mask.png")
    assert main(files) == 0
    assert "mask.png: 2 of 3 parts of the mask are so small or thin" in capsys.readouterr().err
    thin[:] = 0
    thin[8:12, 8:12] = 255
    Image.fromarray(thin).save("mask.png")
    assert main(files) == 0
    assert "so small or thin" not in capsys.readouterr().err


def test_command_line_gives_back_what_nothing_is_to_be_generated_of(files, capsys):
    Image.new("L", (51, 37)).save("mask.png")
    assert main([*files, "--checkpoint=not-even-read"]) == 0
    assert Path("out.png").read_bytes() == Path("image.png").read_bytes()
    said = capsys.readouterr()
    assert "warning: mask.png is black: nothing is generated" in said.err
    assert "0% generated: the picture as it was" in said.out


def test_command_line_never_overwrites_an_input(files, capsys):
    Path("link.png").symlink_to("image.png")
    for out in ("image.png", "mask.png", "./image.png", "link.png"):
        before = Path(out).read_bytes()
        assert main([*files, f"--out={out}"]) == 2
        assert "which would be overwritten; name another file" in capsys.readouterr().err
        assert Path(out).read_bytes() == before


def test_command_line_checks_what_it_can_before_the_model(files, capsys, monkeypatch):
    monkeypatch.setattr("asymvq_jax.inference.task.read_model", lambda *_, **__: pytest.fail("the model was read"))
    images.write("wide.png", np.zeros((1, 16384, 3), np.uint8))
    np.save("z.npy", np.zeros((4, 5, 7), complex))
    for options, message in (
        (["--image=wide.png", "--out=o.webp"], "16384 x 1 px cannot be written as WEBP"),
        (["--latent-layout=channels-first"], "name it too"),
        (["--latent-scaled=no"], "name it too"),
        (["--latent=z.npy", "--scaled-latent", "--unscaled-latent"], "contradict each other"),
        (["--latent=z.npy"], "latent z.npy holds values of type complex128"),
        (["--mask-channel=alpha"], "has no alpha channel"),
        (["--band=-1"], "expected zero or more"),
    ):
        assert main([*files, *options]) == 2
        assert message in capsys.readouterr().err


def test_keeping_exactly_takes_any_decoder(model):
    image, mask = _picture()
    plain = Autoencoder(ModelConfig(**{**vars(CONFIG), "condition": False}), rngs=nnx.Rngs(0))
    kept = inpaint(plain, image, mask, keep="exact", band=0).image
    np.testing.assert_array_equal(kept[mask[..., 0] == 0], image[mask[..., 0] == 0])


def test_a_haze_of_a_soft_mask_does_not_undo_an_exact_copy(model):
    image, mask = _picture()
    hazy = np.maximum(mask, np.float32(1 / 255))
    kept = inpaint(model, image, hazy, keep="exact", band=3)
    np.testing.assert_array_equal(kept.image[30:], image[30:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[..., 0], "expected (h, w, 3)"),
        (lambda x: np.dstack([x, x[..., :1]]), "shape (37, 51, 4)"),
        (lambda x: x[None], "expected (h, w, 3)"),
        (lambda x: x / np.float32(255), "of type float32, holding 0 to 1: expected uint8"),
        (lambda x: x.astype(np.uint16), "of type uint16"),
    ],
)
def test_pictures_of_another_form_are_refused(model, change, message):
    image, mask = _picture()
    image[0, 0], image[0, 1] = 0, 255
    with pytest.raises(InputError, match=re.escape(message)):
        inpaint(model, change(image), mask)


def test_masks_and_arrays_of_another_form_are_refused(model):
    image, mask = _picture()
    for wrong in (np.dstack([mask] * 3), mask[None], mask.astype(str)):
        with pytest.raises(InputError, match="the mask has shape"):
            inpaint(model, image, wrong)
    pixels = np.asarray(images.to_float(image))[None]
    for array, message in ((image[None], "of type uint8"), (pixels * 255, "expected floats in"), (pixels[0], "shape")):
        with pytest.raises(InputError, match=message):
            encode(model, array)
    latent = encode(model, pixels)
    with pytest.raises(InputError, match="masks with values"):
        decode(model, latent, pixels, mask[None] * 255)
    with pytest.raises(InputError, match="masks of shape"):
        decode(model, latent, pixels, mask[None, :30])
