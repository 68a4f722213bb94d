"""Sources and the pipeline: determinism, sharding by process, resuming, corrupt files, messages."""

import dataclasses
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from etils import epath
from PIL import Image

from asymvq_jax.config import DataConfig
from asymvq_jax.data import pipeline, sources
from asymvq_jax.data.pipeline import REPORTED, Inputs, SkippedFiles, held_out, open_inputs, training_batches
from asymvq_jax.data.sources import open_source, open_sources
from asymvq_jax.errors import DataError, ImageError
from asymvq_jax.files import images
from asymvq_jax.files.folders import list_folder
from benchmarks.photographs import copy
from tests.calls import count_calls


def _folder(path, count: int = 12, corrupt: tuple[int, ...] = ()) -> str:
    """Pictures of one colour each: picture i is (20 i, 0, 0)."""
    for i in range(count):
        file = path / f"{'sub/' * (i % 3)}picture{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 50), (20 * i, 0, 0)).save(file)
        if i in corrupt:
            file.write_bytes(file.read_bytes()[:60])
    return str(path)


def _config(path, **changes) -> DataConfig:
    changes = {"eval_path": path, "image_size": 16, "batch_size": 4, "max_corrupt_share": 1.0} | changes
    return DataConfig(source="folder", path=path, **changes)


def _take(config, count, seed=0, index=0, processes=1, state=None):
    batches = training_batches(config, seed, process_index=index, process_count=processes)
    if state is not None:
        batches.set_state(state)
    return [next(batches) for _ in range(count)], batches.get_state()


def _equal(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("image", "mask", "skipped"):
            np.testing.assert_array_equal(x[name], y[name])


def test_photos_are_real_and_the_halves_differ():
    train, test = (open_source(DataConfig(), train=t) for t in (True, False))
    assert len(train) == 8
    assert len(test) == 2
    for source in (train, test):
        for i in range(len(source)):
            picture = source.read(i)
            assert picture.dtype == np.uint8
            assert min(picture.shape[:2]) >= 256
            assert picture.std() > 20
    assert not {train.name(i) for i in range(8)} & {test.name(i) for i in range(2)}


def test_batches_are_functions_of_seed_and_position(tmp_path):
    config = _config(_folder(tmp_path, corrupt=(2, 5)))
    first, state = _take(config, 5)
    again, _ = _take(config, 8)
    _equal(first, again[:5])
    assert first[0]["image"].shape == (4, 16, 16, 3)
    assert first[0]["mask"].shape == (4, 16, 16, 1)
    assert first[0]["skipped"].shape == (4, REPORTED)
    other, _ = _take(config, 5, seed=1)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))
    resumed, _ = _take(config, 3, state=state)
    _equal(resumed, again[5:])


def test_state_is_json(tmp_path):
    import json

    config = _config(_folder(tmp_path))
    _, state = _take(config, 2)
    resumed, _ = _take(config, 1, state=json.loads(json.dumps(state)))
    _equal(resumed, _take(config, 3)[0][2:])


def test_processes_share_the_global_batch(tmp_path):
    config = _config(_folder(tmp_path))
    whole, _ = _take(config, 3)
    halves = [_take(config, 3, index=i, processes=2)[0] for i in range(2)]
    for step in range(3):
        for i in range(2):
            np.testing.assert_array_equal(halves[i][step]["image"], whole[step]["image"][2 * i : 2 * i + 2])
    with pytest.raises(DataError, match=r"data\.batch_size=4: expected a multiple of the 3 processes"):
        training_batches(config, 0, process_index=0, process_count=3)


def test_worker_processes_give_resumable_batches(tmp_path):
    config = _config(_folder(tmp_path), workers=2)
    batches = training_batches(config, 0, process_index=0, process_count=1)
    first = [next(batches) for _ in range(3)]
    state = batches.get_state()
    rest = [next(batches) for _ in range(3)]
    _equal(first, _take(dataclasses.replace(config, workers=0), 3)[0])
    _equal(_take(config, 3, state=state)[0], rest)


def test_an_epoch_holds_every_picture_once_in_its_own_order(tmp_path):
    config = _config(_folder(tmp_path))
    batches, _ = _take(config, 6)
    reds = [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]
    assert Counter(reds[:12]) == Counter(reds[12:]) == Counter(20 * i for i in range(12))
    assert reds[:12] != reds[12:]


def test_corrupt_files_are_replaced_counted_and_named(tmp_path, caplog):
    config = _config(_folder(tmp_path, corrupt=(2, 5)), max_corrupt_share=0.5)
    source = open_source(config, train=True)
    skipped = SkippedFiles(source, config.max_corrupt_share)
    for batch in _take(config, 6)[0]:
        assert all(int(image[0, 0, 0]) not in (40, 100) for image in batch["image"])
        skipped.update(batch["skipped"], batch["small"])
    assert caplog.text.count("picture02.png is skipped") == 1
    assert caplog.text.count("picture05.png is skipped") == 1
    strict = SkippedFiles(source, 0.1)
    everything = np.concatenate([batch["skipped"] for batch in _take(config, 6)[0]])
    with pytest.raises(DataError, match=r"2 of \d+ files read cannot be used, more than data.max_corrupt_share=0.1"):
        strict.update(everything, np.zeros(24, int))


def test_all_corrupt_stops_with_the_last_file_named(tmp_path):
    config = _config(_folder(tmp_path, count=3, corrupt=(0, 1, 2)))
    with pytest.raises(DataError, match=r"pictures in a row cannot be used .* the last is .*picture\d+\.png is not a"):
        _take(config, 1)


def test_small_pictures_are_left_out_once_and_counted(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    config = _config(_folder(tmp_path / "p", corrupt=(11,)), min_side=47)
    kept = epath.Path(tmp_path / "run")
    source = open_sources(config, kept).train
    # Picture i is 40 + i px wide; what cannot be read stays, to be named when it is met.
    assert [source.name(i)[-6:-4] for i in range(len(source))] == ["09", "07", "10", "08", "11"]
    assert "7 of 12 pictures are below data.min_side=47 and are left out, such as" in caplog.text
    batches, _ = _take(config, 3)
    assert min(int(image[0, 0, 0]) for batch in batches for image in batch["image"]) >= 7 * 20
    assert not sum(int(batch["small"].sum()) for batch in batches)

    monkeypatch.setattr(images, "read_size", lambda _: pytest.fail("the sizes are known"))
    assert open_sources(config, kept).train.identity() == source.identity()
    monkeypatch.undo()
    (kept / "too_small.data.path.json").write_text('{"pictures": 3')
    assert open_sources(config, kept).train.identity() == source.identity()
    with pytest.raises(DataError, match=r"data\.path: all 12 pictures are below data\.min_side=100"):
        open_source(_config(_folder(tmp_path / "q"), min_side=100), train=True)


class Mostly:
    """A source of which only the last picture is large enough."""

    def __len__(self):
        return 50

    def name(self, index):
        return f"picture {index}"

    def read(self, index):
        return np.full((60 if index == 49 else 20,) * 2 + (3,), index, np.uint8)


def test_small_pictures_met_in_reading_are_stepped_over_however_many(monkeypatch, caplog):
    monkeypatch.setattr("asymvq_jax.data.pipeline.open_sources", lambda *_: (Mostly(), Mostly()))
    config = DataConfig(image_size=16, batch_size=4, min_side=47)
    batches, _ = _take(config, 2)
    assert all((batch["image"] == 49).all() and (batch["skipped"] == -1).all() for batch in batches)
    counted = SkippedFiles(Mostly(), 0.0)
    for _ in range(13):
        counted.update(batches[0]["skipped"], batches[0]["small"])
    share = batches[0]["small"].sum() / (batches[0]["small"].sum() + 4)
    assert share > 0.8
    assert caplog.text.count(f"{100 * share:.1f}% of the pictures read are below data.min_side") == 1


def test_mirrored_and_recoloured_training_pictures(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8], picture[:, 8:] = (200, 100, 40), (0, 0, 240)
    for i in range(2):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    same = {"image_size": 16, "crop": (1.0, 1.0), "keep_decoded": True}
    [[batch], _] = _take(_config(tmp_path, **same, mirror=1.0), 1)
    mirrored = batch["image"]
    np.testing.assert_array_equal(mirrored, np.broadcast_to(picture[:, ::-1], mirrored.shape))
    recoloured, _ = _take(_config(tmp_path, **same, recolour=1.0), 4)
    halves = {tuple(image[0, x]) for batch in recoloured for image in batch["image"] for x in (0, 15)}
    assert len(halves) > 8
    held = held_out(_config(tmp_path, **same, mirror=1.0, recolour=1.0), 1, 0)["image"]
    np.testing.assert_array_equal(held[0], picture)


def test_photographs_are_copied_smaller(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((1100, 1600, 3), 90, np.uint8)).save(tmp_path / "in" / "Wide.png")
    copy(tmp_path / "in" / "Wide.png", tmp_path)
    (made,) = tmp_path.glob("*_wide.jpg")
    assert images.read(made).shape == (512, 745, 3)


def test_held_out_half_of_a_folder(tmp_path):
    config = _config(_folder(tmp_path, count=25), eval_path="")
    train, test = (open_source(config, train=t) for t in (True, False))
    assert (len(train), len(test)) == (24, 1)
    examples = held_out(config, 5, seed=0)
    assert examples["image"].shape == (5, 16, 16, 3)
    assert ((examples["mask"].mean((1, 2, 3)) > 0) & (examples["mask"].mean((1, 2, 3)) < 1)).all()
    np.testing.assert_array_equal(held_out(config, 5, seed=0)["mask"], examples["mask"])


class Ramps:
    """One picture whose red is the row and whose green is the column, and the same half as large."""

    def __len__(self):
        return 1

    def name(self, index):
        return "ramp"

    def read(self, index):
        rows, columns = np.mgrid[:120, :200].astype(np.uint8)
        return np.stack([rows, columns, rows], -1)


def _edges(images: np.ndarray) -> np.ndarray:
    """Top, left, height and width of the crops of a ramp, by their smallest and largest values: (n, 4)."""
    low, high = images[..., :2].min((1, 2)).astype(int), images[..., :2].max((1, 2)).astype(int)
    return np.concatenate([low, high - low + 1], -1)


def test_crops_have_the_share_and_lie_anywhere():
    config = DataConfig(image_size=60, batch_size=50, crop=(0.5, 0.5))
    inputs = Inputs(Ramps(), Ramps(), ())
    images_ = next(training_batches(config, 0, process_index=0, process_count=1, inputs=inputs))["image"]
    tops, lefts, heights, widths = _edges(images_).T
    # Half of the shorter side, at their own scale.
    assert set(heights) == set(widths) == {60}
    assert (tops.min(), lefts.min()) < (8, 15)
    assert tops.max() > 52
    assert lefts.max() > 125
    wide = dataclasses.replace(config, crop=(0.25, 1.0), image_size=16)
    images_ = next(training_batches(wide, 0, process_index=0, process_count=1, inputs=inputs))["image"]
    heights = _edges(images_)[:, 2]
    assert heights.min() < 45
    assert heights.max() > 100


def test_held_out_crops_follow_the_config_after_the_centre():
    config = DataConfig(image_size=60, batch_size=1, crop=(0.5, 0.5))
    centre, *others = _edges(held_out(config, 12, 0, Inputs(Ramps(), Ramps(), ()))["image"])
    # The centre square: all of the height, and the middle of the width.
    np.testing.assert_allclose(centre, [0, 40, 120, 120], atol=2)
    assert all((height, width) == (60, 60) for _, _, height, width in others)
    assert len({(top, left) for top, left, _, _ in others}) > 8


def test_held_out_pictures_are_not_below_the_least_side():
    config = DataConfig(image_size=16, batch_size=1, min_side=47)
    assert (held_out(config, 3, 0, Inputs(Mostly(), Mostly(), ()))["image"] == 49).all()


def test_crops_are_resized_by_area():
    class Stripes(Ramps):
        def read(self, index):
            # Black and light rows by turns.
            return np.tile(np.uint8([0, 200]).reshape(2, 1, 1), (32, 64, 3))

    config = DataConfig(image_size=16, batch_size=4, crop=(1.0, 1.0))
    batches = training_batches(config, 0, process_index=0, process_count=1, inputs=Inputs(Stripes(), Stripes(), ()))
    # Four rows of the picture become one.
    assert (next(batches)["image"] == 100).all()


def test_held_out_masks_are_partial(monkeypatch):
    # A full and an empty mask come before each partial one.
    rows = itertools.cycle([16, 0, 8])

    def draw(rng, size, *_):
        mask = np.zeros((size, size, 1), np.uint8)
        mask[: next(rows)] = 1
        return mask

    monkeypatch.setattr(pipeline, "random_mask", draw)
    masks = held_out(DataConfig(image_size=16, batch_size=1), 2, 0, Inputs(Ramps(), Ramps(), ()))["mask"]
    assert [mask.mean() for mask in masks] == [0.5, 0.5]


def _names(sources) -> tuple[set[str], set[str]]:
    return tuple({source.name(i) for i in range(len(source))} for source in sources)


@pytest.mark.parametrize("count", [2, 300])
def test_no_picture_changes_sides_when_others_come_and_go(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i:03d}.png").touch()
    config = _config(str(tmp_path), eval_path="")
    before, train, test = open_sources(config), *_names(open_sources(config))
    assert train | test == {str(tmp_path / f"{i:03d}.png") for i in range(count)}
    assert 0 < len(test) < max(2, count / 10)
    (tmp_path / "000.jpg").touch()
    assert before.train.identity() != open_sources(config).train.identity()
    assert not _names(open_sources(config))[1] & train
    (tmp_path / "000.jpg").unlink()
    assert [half.identity() for half in open_sources(config)] == [half.identity() for half in before]
    # A moved directory is the same data.
    moved = tmp_path.rename(f"{tmp_path}_moved")
    halves = open_sources(_config(str(moved), eval_path=""))
    assert [half.identity() for half in halves] == [half.identity() for half in before]


def test_both_halves_come_from_one_listing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "list_folder", lambda *a, **k: calls.append(a) or list_folder(*a, **k))
    config = _config(_folder(tmp_path), eval_path="")
    inputs = open_inputs(config)
    training_batches(config, 0, process_index=0, process_count=1, inputs=inputs)
    held_out(config, 2, 0, inputs)
    assert len(calls) == 1


def test_dividing_a_folder_takes_work_in_proportion_to_its_files(tmp_path):
    calls = []
    for count in (100, 800):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.jpg").touch()
        calls.append(count_calls(partial(open_sources, _config(str(folder), eval_path=""))))
    assert calls[1] < 9 * calls[0]


def test_what_a_folder_leaves_out_is_told_by_reason(tmp_path, caplog):
    caplog.set_level("INFO")
    _folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".thumbs.png").touch()
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    assert len(open_source(_config(str(tmp_path)), train=True)) == 12
    assert "1 hidden" in caplog.text
    assert "1 not pictures (1 .txt), such as notes.txt" in caplog.text
    assert "lost.png is skipped: one of 1 links that lead nowhere" in caplog.text


def test_skipped_files_are_named_with_the_reason(tmp_path, caplog, monkeypatch):
    config = _config(_folder(tmp_path, count=6, corrupt=(0,)))
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 4000)
    source = open_source(config, train=True)
    skipped = SkippedFiles(source, 1.0)
    indices = [
        i for i in range(len(source)) if Path(source.name(i)).name in ("empty.png", "picture00.png", "large.png")
    ]
    skipped.update(np.array([indices]), np.zeros(1, int))
    assert re.search(r"empty\.png is skipped: is not a readable picture: the file is empty", caplog.text)
    assert re.search(r"picture00\.png is skipped: is not a readable picture", caplog.text)
    assert re.search(r"large\.png is skipped: .*pixels", caplog.text)
    (tmp_path / "picture03.png").unlink()
    (tmp_path / "picture03.png").mkdir()
    with pytest.raises(ImageError, match=r"picture03\.png"):
        source.read(next(i for i in range(len(source)) if source.name(i).endswith("picture03.png")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "does not exist"),
        (lambda p: p, "holds no pictures (found 1 other files)"),
        (lambda p: p / "notes.txt", "is a file; expected a directory"),
    ],
)
def test_unusable_folders_are_named(tmp_path, make, message):
    (tmp_path / "notes.txt").write_text("no picture")
    path = make(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"data.path={str(path)!r} {message}")):
        open_source(_config(str(path)), train=True)


def _write_array_record(path, pictures: list[bytes]) -> None:
    """A TFDS data set as ArrayRecord, written without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            for i, picture in enumerate(pictures):
                yield i, {"image": io.BytesIO(picture), "label": i}

    Tiny(data_dir=path, file_format="array_record").download_and_prepare()


def _png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    _write_array_record(path, [_png(20 * i) for i in range(4)])
    return path


def _tfds(data_dir, **changes) -> DataConfig:
    return DataConfig(**({"source": "tfds", "path": "tiny", "data_dir": data_dir} | changes))


def test_tfds_without_tensorflow(array_record):
    import sys

    source = open_source(_tfds(array_record), train=True)
    assert len(source) == 4
    assert sorted(int(source.read(i)[0, 0, 0]) for i in range(4)) == [0, 20, 40, 60]
    assert source.name(2) == "tiny/train[2]"
    batches, _ = _take(_tfds(array_record, image_size=8, batch_size=2), 2)
    assert batches[0]["image"].shape == (2, 8, 8, 3)
    assert "tensorflow" not in sys.modules


def test_splits_are_read_as_tfds_reads_them(array_record):
    assert len(open_source(_tfds(array_record, train_split="train+validation"), train=True)) == 8
    assert len(open_source(_tfds(array_record, eval_split="validation[1:3]"), train=False)) == 2
    whole, part = (open_source(_tfds(array_record, train_split=split), train=True) for split in ("train", "train[:3]"))
    assert whole.identity() == open_source(_tfds(array_record), train=True).identity() != part.identity()


def test_damaged_shards_are_skipped_counted_and_named(array_record, tmp_path, caplog):
    shutil.copytree(Path(array_record) / "tiny", tmp_path / "tiny")
    (shard,) = (tmp_path / "tiny/1.0.0").glob("tiny-train.array_record*")
    os.truncate(shard, 1000)
    source = open_source(_tfds(str(tmp_path)), train=True)
    with pytest.raises(ImageError, match=r"tiny/train\[1\] cannot be read: .*ArrayRecord"):
        source.read(1)
    with pytest.raises(DataError, match="pictures in a row cannot be used"):
        _take(_tfds(str(tmp_path), image_size=8, batch_size=2), 1)
    shard.unlink()
    with pytest.raises(
        DataError, match=r"train\.array_record-.* is missing, one of 1 shards of data\.train_split='train'"
    ):
        open_source(_tfds(str(tmp_path)), train=True)


def test_a_set_whose_own_code_needs_tensorflow_is_not_prepared(tmp_path, monkeypatch):
    def needing(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr("tensorflow_datasets.builder", needing)
    with pytest.raises(DataError, match=r"data\.path='coco' is not prepared in .*prepare it with: tfds build coco"):
        open_source(DataConfig(source="tfds", path="coco", data_dir=str(tmp_path)), train=True)


def test_a_killed_trainer_takes_its_workers_with_it(tmp_path):
    folder = _folder(tmp_path)
    program = f"""
import subprocess, sys, time
from test_data import _config
from asymvq_jax.data.pipeline import training_batches
if __name__ == "__main__":
    batches = training_batches(_config({folder!r}, workers=1), 0, process_index=0, process_count=1)
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests/data", *sys.path])}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, env=environment)
    try:
        with process.stdout as printed:
            assert printed.readline() == b"ready\n"
        children = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        assert children
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "no_such_dataset"}, "data.path='no_such_dataset' is not a TFDS data set"),
        ({"image_key": "photo"}, "data.image_key='photo' is not a feature of tiny; it has: image, label"),
        ({"train_split": "test"}, "data.train_split='test': tiny has no split 'test'; it has: train, validation"),
        ({"train_split": "train[:999]"}, "data.train_split='train[:999]': Requested slice [:999] incompatible with 4"),
        ({"train_split": "train["}, "data.train_split='train[': Error parsing split"),
        ({"train_split": "train[2:2]"}, "data.train_split='train[2:2]'"),
    ],
)
def test_unusable_tfds_is_named(array_record, changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(_tfds(array_record, **changes), train=True)
