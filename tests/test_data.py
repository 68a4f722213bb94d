"""Sources and the pipeline: determinism, sharding by process, resuming, corrupt files, messages."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from asymvq_jax.config import DataConfig
from asymvq_jax.data.pipeline import ATTEMPTS, CorruptFiles, held_out, training_batches
from asymvq_jax.data.sources import open_source
from asymvq_jax.errors import DataError


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
    assert first[0]["skipped"].shape == (4, ATTEMPTS)
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
    whole, _ = _take(config, 6)
    first, state = _take(config, 3)
    rest, _ = _take(config, 3, state=state)
    _equal(first + rest, whole)


def test_an_epoch_holds_every_picture_once_in_its_own_order(tmp_path):
    config = _config(_folder(tmp_path))
    batches, _ = _take(config, 6)
    reds = [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]
    assert Counter(reds[:12]) == Counter(reds[12:]) == Counter(20 * i for i in range(12))
    assert reds[:12] != reds[12:]


def test_corrupt_files_are_replaced_counted_and_named(tmp_path, caplog):
    config = _config(_folder(tmp_path, corrupt=(2, 5)), max_corrupt_share=0.5)
    source = open_source(config, train=True)
    corrupt = CorruptFiles(source, config.max_corrupt_share)
    for batch in _take(config, 6)[0]:
        assert all(int(image[0, 0, 0]) not in (40, 100) for image in batch["image"])
        corrupt.update(batch["skipped"], 4)
    assert caplog.text.count("picture02.png is skipped") == 1
    assert caplog.text.count("picture05.png is skipped") == 1
    strict = CorruptFiles(source, 0.1)
    everything = np.concatenate([batch["skipped"] for batch in _take(config, 6)[0]])
    with pytest.raises(DataError, match=r"2 of \d+ files read are corrupt, more than data.max_corrupt_share=0.1"):
        strict.update(everything, 24)


def test_all_corrupt_stops_with_the_last_file_named(tmp_path):
    config = _config(_folder(tmp_path, count=3, corrupt=(0, 1, 2)))
    with pytest.raises(Exception, match="8 pictures in a row cannot be used"):
        _take(config, 1)


def test_small_pictures_are_stepped_over_but_not_corrupt(tmp_path):
    config = _config(_folder(tmp_path), min_side=47)
    batches, _ = _take(config, 3)
    assert min(int(image[0, 0, 0]) for batch in batches for image in batch["image"]) >= 7 * 20
    assert all((batch["skipped"] == -1).all() for batch in batches)


def test_held_out_half_of_a_folder(tmp_path):
    config = _config(_folder(tmp_path, count=25), eval_path="")
    train, test = (open_source(config, train=t) for t in (True, False))
    assert (len(train), len(test)) == (23, 2)
    examples = held_out(config, 5, seed=0)
    assert examples["image"].shape == (5, 16, 16, 3)
    assert ((examples["mask"].mean((1, 2, 3)) > 0) & (examples["mask"].mean((1, 2, 3)) < 1)).all()
    np.testing.assert_array_equal(held_out(config, 5, seed=0)["mask"], examples["mask"])


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "no_such_dataset"}, "data.path='no_such_dataset' is no TFDS data set"),
        ({"image_key": "photo"}, "data.image_key='photo' is no feature of tiny; it has: image, label"),
        ({"train_split": "test"}, "tiny has no split 'test'; it has: train, validation"),
    ],
)
def test_unusable_tfds_is_named(array_record, changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(_tfds(array_record, **changes), train=True)
