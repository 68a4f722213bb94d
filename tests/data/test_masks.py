"""Masks: every kind's geometry, LaMa's numbers, files, soft masks against diffusers, and the messages."""

import dataclasses
import re

import cv2
import numpy as np
import pytest
import torch
from oracles import asymmetric, nchw, nhwc, numpy_state
from PIL import Image

from asymvq_jax.commands import inpaint
from asymvq_jax.commands import masks as draw_masks
from asymvq_jax.config import MASK_PRESETS, Config, DataConfig, MaskConfig, ModelConfig, RunConfig, override
from asymvq_jax.convert.mapping import model_from_tensors
from asymvq_jax.data import masks
from asymvq_jax.data.masks import find_files, random_mask
from asymvq_jax.data.pipeline import held_out, training_batches
from asymvq_jax.errors import ConfigError, DataError
from asymvq_jax.files import images
from asymvq_jax.models.checkpoints import save_model

NONE = dict.fromkeys(MaskConfig().weights, 0.0)
KINDS = ("strokes", "boxes", "squares", "superres", "outpainting")
SIZES = (8, 16, 48, 97, 256)
BASE = Config(run=RunConfig(train_encoder=True))


def _only(kind: str, **changes) -> MaskConfig:
    return MaskConfig(**NONE | {kind: 1.0, "full_probability": 0.0} | changes)


def _draw(config: MaskConfig, size: int, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [random_mask(rng, size, config)[..., 0] for _ in range(count)]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the smallest box around the mask."""
    ys, xs = np.nonzero(mask)
    return ys.min(), ys.max() + 1, xs.min(), xs.max() + 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_and_size_are_binary_partial_and_repeatable(kind, size):
    rng = np.random.default_rng(0)
    drawn = [random_mask(rng, size, _only(kind)) for _ in range(50)]
    assert all(m.shape == (size, size, 1) and m.dtype == np.uint8 and set(np.unique(m)) <= {0, 1} for m in drawn)
    assert all(m.any() for m in drawn)
    assert 0.01 < np.mean(drawn) < 0.9
    for mask, again in zip(drawn, _draw(_only(kind), size, 50), strict=True):
        np.testing.assert_array_equal(mask[..., 0], again)
    assert any(
        (mask[..., 0] != other).any() for mask, other in zip(drawn, _draw(_only(kind), size, 50, 1), strict=True)
    )


def test_the_default_draws_what_it_always_drew():
    """Where the random numbers end after 20 masks: runs begun before the other kinds came resume with their batches."""
    rng = np.random.default_rng(0)
    areas = [random_mask(rng, 64, MaskConfig()).mean() for _ in range(20)]
    assert 0.3 < np.mean([a == 1 for a in areas]) < 0.7
    assert rng.random() == 0.16336809113695616


def test_the_full_mask_and_the_mixture_have_their_shares():
    config = MaskConfig(**NONE | {"boxes": 1.0, "superres": 3.0}, full_probability=0.25)
    drawn = _draw(config, 64, 800)
    full = np.array([m.all() for m in drawn])
    # A box leaves the first column free at the default margin.
    boxes = np.array([not m[:, 0].any() for m in drawn])
    assert abs(full.mean() - 0.25) < 0.05
    assert abs(boxes[~full].mean() - 0.25) < 0.05


def test_inverted_masks():
    config = _only("boxes")
    inverted = dataclasses.replace(config, invert_probability=1.0)
    np.testing.assert_array_equal(_draw(inverted, 64, 1)[0], 1 - _draw(config, 64, 1)[0])
    half = _draw(dataclasses.replace(config, invert_probability=0.5), 64, 200)
    assert 0.4 < np.mean([m[0, 0] for m in half]) < 0.6


# configs/data_gen/random_*.yaml: irregular's min_times, max_times, max_len, max_width; box's margin, bbox_min_size,
# bbox_max_size, min_times, max_times.
PUBLISHED = {
    "thin_256": ((4, 50, 40, 10), None),
    "medium_256": ((4, 5, 100, 50), (0, 10, 50, 1, 5)),
    "thick_256": ((1, 5, 200, 100), (10, 30, 150, 1, 3)),
    "thin_512": ((4, 70, 100, 20), None),
    "medium_512": ((4, 10, 200, 100), (0, 30, 150, 1, 5)),
    "thick_512": ((1, 5, 450, 250), (10, 30, 300, 1, 4)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_lamas_numbers(name, monkeypatch):
    size = int(name[-3:])
    (least, most, lengths, widths), box = PUBLISHED[name]
    config = MaskConfig(**MASK_PRESETS[name], full_probability=0.0)
    assert config.weights == NONE | {"strokes": 1.0, "boxes": 0.3 if box else 0.0}
    assert config.invert_probability == 0
    if box:
        assert (config.box_margin, *config.box_side, *config.box_count) == box

    lines = []
    monkeypatch.setattr(masks.cv2, "line", lambda mask, *line: lines.append(line))
    counts = []
    for _ in range(400):
        before = len(lines)
        _draw(dataclasses.replace(config, boxes=0.0, stroke_segments=1), size, 1, seed=len(counts))
        counts.append(len(lines) - before)
        # The first stroke and every other one go to the left, their mirror images between them to the right.
        assert all((end[0] - start[0]) * (-1, 1)[i % 2] >= 0 for i, (start, end, *_) in enumerate(lines[before:]))
    # max_times is 1 less than what its generator draws at most.
    assert (min(counts), max(counts)) == (least, most + 1)
    drawn_widths = [width for *_, width in lines]
    assert 5 <= min(drawn_widths) <= 5 + 0.05 * widths
    assert 4 + 0.95 * widths <= max(drawn_widths) <= 4 + widths
    inside = [np.hypot(*np.subtract(end, start)) for start, end, *_ in lines if min(end) > 0 and max(end) < size]
    # Truncated to pixels in both directions.
    assert min(inside) >= 10 - 2
    assert max(inside) <= 9 + lengths + 2
    # 0.01 + 0, 1, 2 or 3 rad and the mirror images; truncation turns short segments too far.
    for start, end, *_ in lines:
        dx, dy = np.subtract(end, start)
        if min(end) > 0 and max(end) < size and np.hypot(dx, dy) > 60:
            assert min(abs(abs(np.arctan2(dx, dy)) - (0.01 + turn)) for turn in range(4)) < 0.03


def test_lengths_scale_with_the_picture(monkeypatch):
    widths = {}
    for size in (128, 256, 512):
        drawn = []
        monkeypatch.setattr(masks.cv2, "line", lambda mask, a, b, value, width, drawn=drawn: drawn.append(width))
        _draw(_only("strokes"), size, 20)
        widths[size] = np.array(drawn)
    np.testing.assert_allclose(widths[512], 2 * widths[256])
    np.testing.assert_allclose(widths[128], widths[256] / 2, atol=0.5)
    small = _only("boxes", box_count=(1, 1))
    for a, b in ((small, 256), (dataclasses.replace(small, resolution=512), 512)):
        sides = np.array([[bottom - top, right - left] for top, bottom, left, right in map(_box, _draw(a, b, 300))])
        assert 30 <= sides.min() <= 32
        assert 148 <= sides.max() <= 150


@pytest.mark.parametrize("size", SIZES)
def test_boxes_keep_their_sides_and_the_margin(size):
    scale = size / 256
    for mask in _draw(_only("boxes", box_count=(1, 1)), size, 100):
        top, bottom, left, right = _box(mask)
        assert mask[top:bottom, left:right].all()
        for side in (bottom - top, right - left):
            assert round(30 * scale) <= side <= round(150 * scale)
        assert min(top, left, size - bottom, size - right) >= round(10 * scale)


@pytest.mark.parametrize("size", SIZES)
def test_boxes_fit_where_rounding_leaves_no_room(size):
    """A box and two margins that fill the resolution exactly."""
    for mask in _draw(_only("boxes", box_side=(16, 256), box_margin=120), size, 50):
        assert mask.any()


@pytest.mark.parametrize("size", SIZES)
def test_squares_are_square_and_cut_off_at_the_edges(size):
    edges = set()
    for mask in _draw(_only("squares", square_count=(1, 1), stroke_segments=1), size, 300):
        top, bottom, left, right = _box(mask)
        assert mask[top:bottom, left:right].all()
        height, width = bottom - top, right - left
        assert max(height, width) <= max(2, round(24 * size / 256))
        at_edge = {"upper": top == 0, "lower": bottom == size, "left": left == 0, "right": right == size}
        assert any(at_edge.values()) or (height == width and height % 2 == 0)
        edges |= {name for name, here in at_edge.items() if here}
    assert len(edges) == 4


@pytest.mark.parametrize("size", SIZES)
def test_superres_masks_are_periodic_rows_and_columns(size):
    drawn = _draw(_only("superres"), size, 200)
    for mask in drawn:
        rows, columns = mask.all(1), mask.all(0)
        np.testing.assert_array_equal(mask, rows[:, None] | columns)
        for line in (rows, columns):
            steps = [s for s in (2, 3, 4) if (line[s:] == line[:-s]).all()]
            assert steps
            assert 1 <= line[: steps[0]].sum() < steps[0]
    assert len({m.tobytes() for m in drawn}) > 50
    wide = _draw(_only("superres", superres_step=(4, 4), superres_width=(3, 3)), 64, 5)
    assert all((1 - m).sum() == 16 * 16 for m in wide)


@pytest.mark.parametrize("size", SIZES)
def test_outpainting_masks_margins(size):
    least, most = max(1, int(0.04 * size)), max(1, int(0.25 * size) - 1)
    for side, turns in (("left", 0), ("top", 3), ("right", 2), ("bottom", 1)):
        # However improbable, the only side that may be masked is.
        sides = tuple(0.01 * (s == side) for s in ("left", "top", "right", "bottom"))
        widths = set()
        for mask in _draw(_only("outpainting", outpainting_sides=sides), size, 300):
            turned = np.rot90(mask, -turns)
            width = int(turned[0].sum())
            np.testing.assert_array_equal(turned, np.broadcast_to(np.arange(size) < width, (size, size)))
            widths.add(width)
        assert (min(widths), max(widths)) == (least, most)
    for mask in _draw(_only("outpainting", outpainting_sides=(1, 1, 1, 1)), size, 50):
        top, bottom, left, right = _box(1 - mask)
        assert mask[top:bottom, left:right].sum() == 0
        assert all(least <= margin <= most for margin in (top, left, size - bottom, size - right))
    assert _draw(_only("outpainting", outpainting_padding=(0, 0)), size, 5)[0].any()


@pytest.fixture
def folder(tmp_path):
    """Two masks of 40 x 80 px: the left half, and the right half in a grey below the threshold."""
    left = np.zeros((40, 80), np.uint8)
    left[:, :40] = 255
    (tmp_path / "deeper").mkdir()
    Image.fromarray(left).save(tmp_path / "left.png")
    Image.fromarray((255 - left) // 3).save(tmp_path / "deeper" / "faint.png")
    return tmp_path


def _data(path, **mask) -> DataConfig:
    mask = MaskConfig(**{**NONE, "files": 1.0, "full_probability": 0.0, "path": str(path)} | mask)
    return DataConfig(image_size=16, batch_size=4, mask=mask)


def test_masks_from_files_are_resized_and_thresholded(folder):
    config = _data(folder).mask
    files = find_files(config)
    assert [f.name for f in files] == ["faint.png", "left.png"]
    rng = np.random.default_rng(0)
    for size in (16, 23, 120):
        drawn = [random_mask(rng, size, config, files) for _ in range(20)]
        assert all(m.shape == (size, size, 1) and m.dtype == np.uint8 for m in drawn)
        faint, left = ([m[..., 0] for m in drawn if m.any() == full] for full in (False, True))
        assert faint
        assert left
        columns = np.arange(size)
        for mask in left:
            # At an odd size half of the middle column is masked.
            expected = np.broadcast_to(columns < (size + 1) // 2, (size, size))
            assert abs(mask.astype(int) - expected).sum() <= size
            np.testing.assert_array_equal(mask[:, : size // 2], 1)
            np.testing.assert_array_equal(mask[:, size // 2 + 1 :], 0)
    assert find_files(MaskConfig()) == []


def test_batches_take_masks_from_files(folder):
    batch = next(training_batches(_data(folder), 0, process_index=0, process_count=1))
    areas = batch["mask"].mean((1, 2, 3))
    assert set(areas) <= {0, 0.5}
    assert batch["mask"].dtype == np.uint8
    # Held-out masks are never empty, as the faint one is.
    assert (held_out(_data(folder), 6, 0)["mask"].mean((1, 2, 3)) == 0.5).all()
    mixed = held_out(_data(folder, outpainting=1.0), 20, 0)["mask"]
    assert 0 < (mixed.mean((1, 2, 3)) == 0.5).mean() < 1


def test_one_mask_file_that_cannot_be_read_is_skipped_and_named(tmp_path, caplog):
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    config = _data(tmp_path).mask
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert not random_mask(rng, 16, dataclasses.replace(config, full_probability=0.0), find_files(config)).any()
    assert caplog.text.count("broken.png is not a readable picture") == 1


def test_unusable_mask_files_stop_before_training(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "white").mkdir()
    Image.new("L", (8, 8), 255).save(tmp_path / "white" / "white.png")
    begin = (
        lambda data: training_batches(data, 0, process_index=0, process_count=1),
        lambda data: held_out(data, 2, 0),
    )
    for function in begin:
        for name, message in (("none", "does not exist"), ("empty", "holds no pictures")):
            path = str(tmp_path / name)
            with pytest.raises(DataError, match=re.escape(f"data.mask.path={path!r} {message}")):
                function(_data(path))
    with pytest.raises(DataError, match=r"data\.mask gave 100 full or empty masks in a row"):
        held_out(_data(tmp_path / "white"), 1, 0)
    (tmp_path / "white" / "white.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"data\.mask\.path: 100 files .*white\.png is not a readable picture"):
        held_out(_data(tmp_path / "white"), 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_probability": 1.5}, "data.mask.full_probability=1.5: expected a number in [0, 1]"),
        ({"invert_probability": -0.1}, "data.mask.invert_probability=-0.1: expected a number in [0, 1]"),
        ({"squares": -1.0}, "data.mask.squares=-1.0: expected a weight of zero or more"),
        ({"outpainting": float("inf")}, "data.mask.outpainting=inf: expected a finite number"),
        ({"superres": float("nan")}, "data.mask.superres=nan: expected a finite number"),
        (NONE, "data.mask.strokes=0.0: expected a positive weight here or of another kind: strokes, boxes, squares"),
        ({"files": 1.0}, "data.mask.path='': expected a directory"),
        ({"path": "masks"}, "data.mask.files=0.0: expected more than 0"),
        ({"resolution": 0}, "data.mask.resolution=0: expected at least 1"),
        ({"stroke_segments": 0}, "data.mask.stroke_segments=0: expected at least 1"),
        ({"square_width": 0}, "data.mask.square_width=0: expected at least 1"),
        ({"stroke_count": (0, 3)}, "data.mask.stroke_count=(0, 3): expected (least, most) with 1 <= least"),
        ({"square_count": (3,)}, "data.mask.square_count=(3,): expected a tuple of 2 integers"),
        ({"box_side": (150, 30)}, "data.mask.box_side=(150, 30): expected (least, most)"),
        ({"box_margin": -1}, "data.mask.box_margin=-1: expected zero or more"),
        ({"box_margin": 114}, "room for a box of 30 px between two margins in 256 px"),
        ({"superres_step": (1, 2)}, "data.mask.superres_width=(1, 3): expected a least width below 1"),
        ({"outpainting_sides": (1.0, 1.0)}, "data.mask.outpainting_sides=(1.0, 1.0): expected a tuple of 4 numbers"),
        ({"outpainting_sides": (0.0,) * 4}, "expected four probabilities, not all of them 0"),
        ({"outpainting_padding": (0.3, 0.2)}, "data.mask.outpainting_padding=(0.3, 0.2): expected (least, most)"),
        ({"outpainting_padding": (0.3, 1.2)}, "with 0 <= least <= most <= 1"),
    ],
)
def test_bad_values_name_the_field_and_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        MaskConfig(**changes)


def test_presets_on_the_command_line():
    assert MaskConfig(**MASK_PRESETS["thick_256"]) == MaskConfig()
    base = override(BASE, ["--data.mask.full_probability=0.1", "--data.mask.superres=2", "--data.mask.box_side=9,9"])
    thin = override(base, ["--data.mask=thin_256"]).data.mask
    assert thin == MaskConfig(**MASK_PRESETS["thin_256"], full_probability=0.1)
    fields = ["--data.mask.stroke_width=7", "--data.mask.outpainting_sides=1,0,0,0.5"]
    preset = ["--data.mask=thin_512", "--data.mask", "medium_512"]
    for arguments in (fields + preset, preset + fields):
        expected = MASK_PRESETS["medium_512"] | {"stroke_width": 7, "outpainting_sides": (1.0, 0.0, 0.0, 0.5)}
        assert override(base, arguments).data.mask == MaskConfig(**expected, full_probability=0.1)
    with pytest.raises(ConfigError, match="or a preset: thin_256, medium_256, thick_256"):
        override(BASE, ["--data.mask=thin"])


def test_soft_mask_files(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    soft = images.read_mask(tmp_path / "ramp.png", soft=True)
    assert soft.dtype == np.float32
    np.testing.assert_array_equal(soft[0, :, 0], np.arange(256, dtype=np.float32) / np.float32(255))
    hard = images.read_mask(tmp_path / "ramp.png")
    assert hard.dtype == np.uint8
    np.testing.assert_array_equal(hard[0, :, 0], np.arange(256) >= 128)


def test_inpainting_with_a_soft_mask_equals_diffusers(tmp_path):
    config = ModelConfig(
        encoder_channels=(32, 32, 32), decoder_channels=(32, 64, 64), encoder_blocks=1, decoder_blocks=1
    )
    theirs = asymmetric(config)
    save_model(tmp_path / "model", model_from_tensors(config, numpy_state(theirs), "diffusers"))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 40, 3)).astype(np.uint8)
    grey = cv2.GaussianBlur(np.pad(np.full((10, 16), 255, np.uint8), ((6, 8), (12, 12))), (0, 0), 3)
    images.write(tmp_path / "image.png", image)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    arguments = [
        f"--{name}={tmp_path / file}"
        for name, file in {"image": "image.png", "mask": "mask.png", "checkpoint": "model", "out": "out.png"}.items()
    ]
    pixels = image[None].astype(np.float32) / 127.5 - 1
    soft = grey[None, ..., None].astype(np.float32) / 255
    results = {}
    for options, mask in ((["--soft-mask"], soft), ([], (soft >= 0.5).astype(np.float32))):
        assert inpaint.main(arguments + options) == 0
        with torch.no_grad():
            z = theirs.encode(nchw(pixels)).latent_dist.mode()
            expected = images.to_uint8(nhwc(theirs.decode(z, image=nchw(pixels), mask=nchw(mask)).sample)[0])
        result = images.read(tmp_path / "out.png")
        # Rounding to 8 bits.
        assert np.abs(result.astype(int) - expected).max() <= 1
        results[bool(options)] = result.astype(int)
    assert np.abs(results[True] - results[False]).max() > 10


def test_the_command_draws_samples(tmp_path, capsys):
    assert draw_masks.main([str(tmp_path / "masks.png")]) == 0
    drawn = images.read(tmp_path / "masks.png")
    assert drawn.shape == (540, 9 * 132 - 4, 3)
    assert set(np.unique(drawn[16:])) == {0, 200, 255}
    assert draw_masks.main([str(tmp_path / "masks.txt")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
