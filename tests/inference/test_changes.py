"""What an editor changed, found through the noise that it left elsewhere, and one edit after another."""

import io
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from skimage import data

from asymvq_jax.commands.inpaint import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.files.pictures import Picture, read_picture, write_picture
from asymvq_jax.inference import inpaint
from asymvq_jax.inference.changes import find_changes
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model

SIZES = {"encoder_channels": (8, 8, 8), "decoder_channels": (8, 8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
CONFIG = ModelConfig(**SIZES, norm_groups=4)
# A piece that a model decodes quickly.
PIECE = np.ascontiguousarray(data.chelsea()[90:186, 100:228])
PHOTO = np.ascontiguousarray(data.chelsea()[:288, :400])


def jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def autoencoder(image):
    """Blur, grain, blotches and a lighter tone all over, as an editor's autoencoder leaves them."""
    rng = np.random.default_rng(1)
    height, width, _ = image.shape
    half = cv2.resize(image.astype(np.float32), (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    blurred = cv2.resize(half, (width, height), interpolation=cv2.INTER_CUBIC)
    blotches = cv2.resize(
        rng.normal(size=(height // 16, width // 16, 3)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    noisy = 0.35 * image + 0.65 * blurred + 2 * blotches + 3 + 2 * rng.normal(size=image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


NOISE = {
    "none": lambda x: x,
    "jpeg": lambda x: jpeg(x, 60),
    "autoencoder": autoencoder,
    "shift": lambda x: np.roll(x, 1, 1),
    "shift both ways, jpeg": lambda x: jpeg(np.roll(x, (1, -1), (0, 1)), 75),
    "another size": lambda x: cv2.resize(x, (512, 369), interpolation=cv2.INTER_CUBIC),
}


def edit(name):
    """An edited photograph and where it was edited."""
    height, width, _ = PHOTO.shape
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - 150) ** 2 + (columns - 180) ** 2
    other = np.roll(PHOTO[::-1], 90, 0)
    region, content = {
        "object": (disc < 45**2, other),
        "small": (disc < 9**2, other),
        "half": (columns < 0.55 * width, other),
        "tone": (disc < 50**2, np.clip(PHOTO * 0.7 + 50, 0, 255).astype(np.uint8)),
    }[name]
    return np.where(region[..., None], content, PHOTO), region


@pytest.mark.parametrize("name", ["object", "small", "half", "tone"])
@pytest.mark.parametrize("noise", NOISE)
def test_an_edit_is_found_and_nothing_else(noise, name):
    edited, region = edit(name)
    changes = find_changes(PHOTO, NOISE[noise](edited))
    found = changes.mask[..., 0] > 0
    visible = region & (np.abs(edited.astype(int) - PHOTO).max(-1) > 16)
    # A tone that noise of the same strength covers is found in part.
    assert (found & visible).sum() > (0.4 if (noise, name) == ("autoencoder", "tone") else 0.9) * visible.sum()
    around = cv2.dilate(region.astype(np.uint8), np.ones((31, 31), np.uint8)) > 0
    # But for what hangs together with it.
    assert (found & ~around).mean() < 0.002
    moved = {"shift": (1, 0), "shift both ways, jpeg": (-1, 1)}.get(noise, (0, 0))
    np.testing.assert_allclose(changes.shift, moved, atol=0.2)
    if name != "half":
        # Moved back onto the original.
        rest = np.abs(changes.edited.astype(int) - PHOTO)[~around].mean()
        assert rest < (9 if noise == "autoencoder" else 4)


@pytest.mark.parametrize("noise", NOISE)
def test_noise_alone_is_no_edit(noise):
    with pytest.raises(InputError, match="nothing of the edited picture stands out"):
        find_changes(PHOTO, NOISE[noise](PHOTO))


def test_depths_may_differ():
    edited, region = edit("object")
    deep = find_changes(PHOTO.astype(np.uint16) * 257, edited)
    assert deep.edited.dtype == np.uint16
    np.testing.assert_array_equal(deep.edited, edited.astype(np.uint16) * 257)
    np.testing.assert_array_equal(deep.mask, find_changes(PHOTO, edited).mask)
    assert deep.mask[region].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8), "nearly everywhere|too much"),
        (lambda x: np.ascontiguousarray(x[:, ::-1]), "nearly everywhere|too much"),
        (lambda x: x[:, :300], "of another shape"),
        (lambda x: x[..., 0], "expected \\(h, w, 3\\)"),
    ],
)
def test_another_picture_is_told(change, message):
    with pytest.raises(InputError, match=message):
        find_changes(PHOTO, change(PHOTO))


@pytest.fixture(scope="module")
def model():
    return Autoencoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def files(model, tmp_path, monkeypatch):
    """A photograph and what an editor made of it, as options."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", model)
    write_picture("image.png", Picture(PIECE))
    edited = PIECE.copy()
    edited[30:54, 60:90] = PIECE[::-1][30:54, 20:50]
    write_picture("edited.png", Picture(autoencoder(edited)))
    return ["--image=image.png", "--checkpoint=model", "--out=out.png"]


def test_command_line_repairs_what_an_editor_returned(files, model, capsys):
    options = ["--edited=edited.png", "--keep=exact", "--blend=none"]
    assert main([*files, *options, "--save-mask=mask.png"]) == 0
    said = capsys.readouterr()
    assert "of the picture was changed; the rest differs by" in said.err
    assert "mask from the edited picture" in said.out
    mask = read_picture("mask.png").colour > 0
    assert mask[32:52, 62:88].all()
    assert mask.mean() < 0.2
    out = read_picture("out.png").colour
    np.testing.assert_array_equal(out[~mask[..., 0]], PIECE[~mask[..., 0]])
    expected = inpaint(model, PIECE, mask, edited=read_picture("edited.png").colour, keep="exact", blend="none")
    # The same decoder on the same latent, but for the type of what is in between.
    assert np.abs(out.astype(int) - expected.image).max() <= 1
    # The mask that was saved says the same, and the region alone can be filled.
    assert main([*files, *options, "--mask=mask.png", "--out=again.png"]) == 0
    np.testing.assert_array_equal(read_picture("again.png").colour, out)
    assert main([*files, "--edited=edited.png", "--crop-and-stitch", "--work-size=64"]) == 0
    np.testing.assert_array_equal(read_picture("out.png").colour[~mask[..., 0]], PIECE[~mask[..., 0]])


def test_command_line_edits_one_after_another(files, model, capsys):
    """Each changes its own mask only: the original and the fills of earlier edits stay, bit for bit."""
    Path("edits").mkdir()
    rng = np.random.default_rng(2)
    masks = []
    for number in range(4):
        mask = np.zeros(PIECE.shape[:2], bool)
        top, left = 12 * number, 16 * number
        mask[top : top + 16, left : left + 20] = True
        Image.fromarray(mask).save(f"edits/{number}_mask.png")
        masks.append(mask)
        if number % 2:
            np.save(f"edits/{number}.npy", rng.normal(size=(4, 24, 32)).astype(np.float32))
        else:
            write_picture(f"edits/{number}.png", Picture(np.roll(PIECE, 13 * (number + 1), 0)))
    options = ["--edits=edits", "--latent-scaled=yes"]
    states = [PIECE]
    for number in range(4):
        Path("some").mkdir(exist_ok=True)
        for path in Path("edits").glob(f"{number}*"):
            shutil.copy(path, "some")
        scaled = options[1:] if number else []
        assert main([*files, "--edits=some", *scaled]) == 0
        states.append(read_picture("out.png").colour)
        changed = (states[-1] != states[-2]).any(-1)
        assert not changed[~masks[number]].any()
        assert changed[masks[number]].mean() > 0.5
    assert main([*files, *options]) == 0
    assert "4 edits" in capsys.readouterr().out
    out = read_picture("out.png").colour
    np.testing.assert_array_equal(out, states[-1])
    untouched = ~np.any(masks, 0)
    np.testing.assert_array_equal(out[untouched], PIECE[untouched])


def test_command_line_messages(files, capsys, monkeypatch):
    monkeypatch.setattr("asymvq_jax.inference.task.read_model", lambda *_, **__: pytest.fail("the model was read"))
    Path("edits").mkdir()
    Image.fromarray(np.zeros((96, 128), bool)).save("mask.png")
    np.save("z.npy", np.zeros((4, 24, 32), np.float32))
    for options, message in (
        ([], "expected --mask, --edited or --edits"),
        (["--edited=image.png"], "nothing of the edited picture stands out"),
        (["--edited=edited.png", "--latent=z.npy"], "does not go with --edited"),
        (["--edits=none"], "--edits none does not exist"),
        (["--edits=edits"], "holds no NAME_mask.png"),
        (["--edits=edits", "--mask=mask.png"], "does not go with --edits"),
        (["--edited=edited.png", "--save-mask=image.png"], "would be overwritten"),
        (["--edited=edited.png", "--save-mask=mask.jpg"], "expected a name that ends in one of .png"),
    ):
        assert main([*files, *options]) == 2
        assert message in capsys.readouterr().err
    for name, content, message in (
        ("a.npy", "z.npy", "a.npy has no mask"),
        ("a_mask.png", "mask.png", "--blend feather changes kept pixels"),
        ("a.png", "image.png", "expected one of them"),
        ("b_mask.png", "mask.png", "b_mask.png has nothing beside it"),
    ):
        (Path("edits") / name).write_bytes(Path(content).read_bytes())
        if name == "b_mask.png":
            Path("edits/a.png").unlink()
        assert main([*files, "--edits=edits", "--blend=feather"]) == 2
        assert message in capsys.readouterr().err
