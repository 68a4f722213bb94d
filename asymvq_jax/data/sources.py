"""Where pictures come from: photographs inside installed packages, a directory tree, or a TFDS data set."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from etils import epath

from asymvq_jax.config import DataConfig
from asymvq_jax.data.identity import Identity, identify, name_key
from asymvq_jax.errors import DataError, ImageError, first_line
from asymvq_jax.files import images
from asymvq_jax.files.addresses import check_address, check_answered, in_bucket
from asymvq_jax.files.folders import BROKEN_LINK, list_folder
from asymvq_jax.files.outputs import write_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")
# Returns what its argument does, which may be called on another process.
Once = Callable[[Callable[[], list[str]]], list[str]]


class Source(Protocol):
    """Random access to pictures; picklable, so that worker processes can read it."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name for messages."""
        ...

    def read(self, index: int) -> np.ndarray:
        """The picture, (h, w, 3) uint8; raises ImageError where it cannot be read or is not a picture."""
        ...

    def identity(self) -> Identity:
        """What a resumed run compares: the pictures, not the path to them."""
        ...


class Sources(NamedTuple):
    """Both halves of a source."""

    train: Source
    held_out: Source


def by_itself(work: Callable[[], list[str]]) -> list[str]:
    """What `work` returns: each process lists for itself."""
    return work()


def open_sources(config: DataConfig, kept: epath.Path | None = None, once: Once = by_itself) -> Sources:
    """Both halves of the source that `config` names, from one listing.

    Args:
        config: the data.
        kept: a directory that keeps what was found out about a folder's pictures for the next time.
        once: lists a folder for all processes, as `cluster.from_first` does; by default each does it by itself.

    Raises:
        DataError: the source is missing, empty, or cannot be read.
    """
    if config.source == "photos":
        return Sources(*(Files(_photos(train), keep_decoded=True) for train in (True, False)))
    if config.source == "folder":
        return Sources(
            *(Files(paths, root, keep_decoded=config.keep_decoded) for paths, root in _halves(config, kept, once))
        )
    return Sources(TFDS(config, "train_split"), TFDS(config, "eval_split"))


def open_source(config: DataConfig, *, train: bool) -> Source:
    """The training or the held-out half alone; see `open_sources`."""
    if config.source == "tfds":
        return TFDS(config, "train_split" if train else "eval_split")
    if config.source == "folder" and config.eval_path:
        path, field = (config.path, "data.path") if train else (config.eval_path, "data.eval_path")
        return Files(
            large_enough(list_pictures(path, field), config.min_side, field),
            epath.Path(path),
            keep_decoded=config.keep_decoded,
        )
    return open_sources(config)[0 if train else 1]


class Files:
    """Pictures in files.

    Args:
        paths: of the files.
        root: the directory within which their names identify them; without one their last parts do.
        keep_decoded: hold every picture in memory once it was read, for a handful of them.
    """

    def __init__(
        self, paths: Sequence[epath.Path], root: epath.Path | None = None, *, keep_decoded: bool = False
    ) -> None:
        self._paths = list(paths)
        self._root = root
        self._decoded: dict[int, np.ndarray] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._paths[index])

    def read(self, index: int) -> np.ndarray:
        """See `Source.read`."""
        if self._decoded is None:
            return self._read(index)
        if index not in self._decoded:
            self._decoded[index] = self._read(index)
        return self._decoded[index]

    def _read(self, index: int) -> np.ndarray:
        try:
            return images.read(self._paths[index])
        except OSError as error:
            raise ImageError(f"{self.name(index)} cannot be read: {error.strerror or error}") from None

    def identity(self) -> Identity:
        """See `Source.identity`."""
        return identify(path.name if self._root is None else within(path, self._root) for path in self._paths)


# The colour photographs that ship inside the wheels of scikit-image and scikit-learn.
TRAIN_PHOTOS = {
    "skimage": (
        "astronaut.png",
        "chelsea.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn": ("china.jpg",),
}
HELD_OUT_PHOTOS = {"skimage": ("coffee.png",), "sklearn": ("flower.jpg",)}
PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def _photos(train: bool) -> list[epath.Path]:
    paths = []
    for package, names in (TRAIN_PHOTOS if train else HELD_OUT_PHOTOS).items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"data.source='photos' needs {package}; install it with: pip install -r requirements.txt")
        folder = Path(spec.submodule_search_locations[0]) / PHOTO_FOLDERS[package]
        paths += [epath.Path(folder / name) for name in names]
    return paths


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# One of so many pictures of a folder is held out.
HELD_OUT_EVERY = 20


def within(path: epath.Path, root: epath.Path) -> str:
    """A file's path within a directory."""
    return str(path.relative_to(root).as_posix())


def _halves(config: DataConfig, kept: epath.Path | None, once: Once) -> Iterator[tuple[list[epath.Path], epath.Path]]:
    """Paths of the training and of the held-out half of a folder, and the directories that they lie in."""

    def listed(path: str, field: str) -> list[epath.Path]:
        found = once(lambda: [*map(os.fspath, large_enough(list_pictures(path, field), config.min_side, field, kept))])
        return [*map(epath.Path, found)]

    root = epath.Path(config.path)
    paths = listed(config.path, "data.path")
    if config.eval_path:
        yield paths, root
        yield listed(config.eval_path, "data.eval_path"), epath.Path(config.eval_path)
        return
    if len(paths) < 2:
        raise DataError(f"data.path={config.path!r} holds one picture only; name held-out ones with --data.eval_path")
    # By a hash of the name, so that no picture changes sides when others are added or removed.
    keys = [name_key(within(path, root)) for path in paths]
    held_out = [key < 2**64 // HELD_OUT_EVERY for key in keys]
    if len({*held_out}) == 1:
        # A small folder: the lowest of the keys is held out, on whichever side of the limit it lies.
        lowest = min(keys)
        held_out = [key == lowest for key in keys]
    yield [path for path, out in zip(paths, held_out, strict=True) if not out], root
    yield [path for path, out in zip(paths, held_out, strict=True) if out], root


# What pictures are packed in, by a part of the name, and what to do about it.
_PACKED = (
    (r"\.(tar|tar\.(gz|bz2)|tgz)$", "an archive: asymvq build-data packs it into a data set for data.source=tfds"),
    (r"\.(zip|7z|rar|tar\.\w+)$", "an archive: unpack it first"),
    (r"tfrecord|\.array_record", "a shard of a data set: name it by data.source=tfds and data.data_dir"),
    (r"\.(parquet|arrow|mdb|h5|hdf5)$", "a table or database: write its pictures as files first"),
    (r"\.(mp4|mkv|mov|avi|webm)$", "a video: write its frames as pictures first"),
    (r"\.(dng|nef|cr2|cr3|arw|orf|raf|rw2)$", "a camera's raw picture: develop it to PNG or JPEG first"),
)


def _packed(names: Iterable[str]) -> str:
    """What files are that may hold pictures, and what to do; empty where none does."""
    first = next(((name, what) for name in names for form, what in _PACKED if re.search(form, name.lower())), None)
    return "" if first is None else f"{Path(first[0]).name} is {first[1]}"


def list_pictures(path: str, field: str) -> list[epath.Path]:
    """All picture files under `path`, recursively, in sorted order; what is left out is logged by reason.

    Raises:
        DataError: the directory is missing, is a file, cannot be read, or holds no picture.
    """
    if not in_bucket(path) and Path(path).is_file():
        hint = _packed([path])
        raise DataError(f"{field}={path!r} is a file; expected a directory of pictures{'; ' if hint else ''}{hint}")
    listing = list_folder(path, f"{field}=", recursive=True)
    if not listing.pictures:
        hint = _packed(file.name for file in listing.others)
        raise DataError(
            f"{field}={path!r} holds no pictures (found {len(listing.others)} other files); "
            f"expected {', '.join(SUFFIXES)}{'; ' if hint else ''}{hint}"
        )
    if rest := listing.describe_rest():
        log.info("%s", rest)
    for each in listing.left_out:
        if each.reason == BROKEN_LINK:
            log.warning("%s/%s is skipped: one of %d %s", path, each.example, each.count, each.reason)
    return list(listing.pictures)


# Threads that read the sizes of pictures.
SIZE_THREADS = 16


def large_enough(
    paths: list[epath.Path], min_side: int, field: str, kept: epath.Path | None = None
) -> list[epath.Path]:
    """The pictures whose shorter side is not below `min_side`, by their heads; unreadable ones stay, to be named later.

    Args:
        paths: the pictures; those of a bucket stay too, since each head would be a request.
        min_side: the least shorter side, px.
        field: the field that names their directory, for messages.
        kept: a directory that keeps the answer for the next time.

    Raises:
        DataError: all pictures are smaller.
    """
    if not min_side or in_bucket(paths[0]):
        return paths
    key = {"pictures": list(identify(map(str, paths))), "min_side": min_side}
    file = None if kept is None else kept / f"too_small.{field}.json"
    small = None if file is None else _kept_small(file, key, len(paths))
    if small is None:
        log.info("reading the sizes of %d pictures, for data.min_side=%d", len(paths), min_side)
        with ThreadPoolExecutor(SIZE_THREADS) as pool:
            below = pool.map(partial(_is_below, min_side), paths, chunksize=64)
            small = [i for i, too_small in enumerate(below) if too_small]
        if file is not None:
            write_bytes(file, json.dumps({**key, "too small": small}).encode())
    if small:
        log.info(
            "%d of %d pictures are below data.min_side=%d and are left out, such as %s",
            len(small), len(paths), min_side, paths[small[0]],
        )  # fmt: skip
    if len(small) == len(paths):
        raise DataError(
            f"{field}: all {len(paths)} pictures are below data.min_side={min_side}, such as {paths[0]}; "
            "lower data.min_side, or name larger pictures"
        )
    left_out = {*small}
    return [path for i, path in enumerate(paths) if i not in left_out]


def _is_below(min_side: int, path: epath.Path) -> bool:
    try:
        return min(images.read_size(path)) < min_side
    except (ImageError, OSError):
        return False


def _kept_small(file: epath.Path, key: dict[str, Any], count: int) -> list[int] | None:
    """What an earlier start found; None where it was of other pictures, or the file is damaged."""
    try:
        stored = json.loads(file.read_bytes())
        small = stored.pop("too small")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    sound = isinstance(small, list) and all(isinstance(i, int) and 0 <= i < count for i in small)
    return small if sound and stored == key else None


class TFDS:
    """One split of a TFDS data set prepared as ArrayRecord, read without TensorFlow.

    Args:
        config: the data.
        field: which of its fields names the split: "train_split" or "eval_split".

    Raises:
        DataError: the data set or the split is missing, or cannot be read at random.
    """

    def __init__(self, config: DataConfig, field: Literal["train_split", "eval_split"]) -> None:
        # Here, because the import takes seconds and only this source needs it.
        import tensorflow_datasets as tfds

        self._name, self._key = config.path, config.image_key
        self._split = config.train_split if field == "train_split" else config.eval_split
        builder = _builder(config)
        info = builder.info
        if config.image_key not in info.features:
            keys = ", ".join(info.features)
            raise DataError(f"data.image_key={config.image_key!r} is not a feature of {config.path}; it has: {keys}")
        named = f"data.{field}={self._split!r}"
        for part in self._split.split("+"):
            name = part.strip().split("[")[0]
            if name not in info.splits and name != "all":
                raise DataError(f"{named}: {config.path} has no split {name!r}; it has: {', '.join(info.splits)}")
        # The picture stays bytes: decoding is ours, so that a corrupt record is found like a corrupt file.
        decoders = {config.image_key: tfds.decode.SkipDecoding()}
        try:
            self._source: Any = builder.as_data_source(split=self._split, decoders=decoders)
            count = len(self._source)
            shards = [epath.Path(each.filename) for each in info.splits[self._split].file_instructions]
        except NotImplementedError as error:
            reason = first_line(error)
            raise DataError(
                f"data.path={config.path!r} cannot be read at random: {reason}; {_prepare(config)}"
            ) from None
        except (ValueError, AssertionError) as error:
            sizes = ", ".join(f"{name} ({split.num_examples} pictures)" for name, split in info.splits.items())
            raise DataError(f"{named}: {first_line(error)} {config.path} has {sizes}") from None
        if not count:
            raise DataError(f"{config.path} has no records in split {self._split!r}")
        # In a bucket each question is a request, and a shard that is missing is named when it is read.
        missing = [shard for shard in shards if not in_bucket(shard) and not shard.exists()]
        if missing:
            raise DataError(
                f"{missing[0]} is missing, one of {len(shards)} shards of {named}; copy or build the data set again "
                f"(asymvq build-data {shards[0].parents[2]} --name {info.name} --check verifies a data set it built)"
            )
        shape = [
            (split, info.splits[split].shard_lengths, info.splits[split].num_bytes) for split in sorted(info.splits)
        ]
        self._identity = Identity(count, identify([info.full_name, self._split, repr(shape)]).digest)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Data set, split and record."""
        return f"{self._name}/{self._split}[{index}]"

    def read(self, index: int) -> np.ndarray:
        """See `Source.read`."""
        try:
            data = self._source[index][self._key]
        except Exception as error:  # Whatever a damaged shard, a failing disk or a bucket makes of it.
            check_answered(error, self.name(index))
            raise ImageError(f"{self.name(index)} cannot be read: {first_line(error)}") from None
        return images.decode(data, self.name(index))

    def identity(self) -> Identity:
        """See `Source.identity`."""
        return self._identity


def _prepare(config: DataConfig) -> str:
    return (
        f"prepare it with: tfds build {config.path} --file_format=array_record (what TFDS knows), or "
        "asymvq build-data (your own pictures)"
    )


def _builder(config: DataConfig) -> Any:
    """TFDS's builder of the data set; raises DataError unless it is there and prepared."""
    import tensorflow_datasets as tfds

    check_address(config.data_dir, "data.data_dir")
    where = config.data_dir or "TFDS's default directory"
    try:
        builder = tfds.builder(config.path, data_dir=config.data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
        reason = first_line(error).rstrip(".")
        raise DataError(f"data.path={config.path!r} is not a TFDS data set: {reason}; {_prepare(config)}") from None
    except Exception as error:  # Code of the data set itself, which imports what only its preparation needs.
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"data.path={config.path!r} is not prepared in {where} (its own code says: {reason}); {_prepare(config)}"
        ) from None
    if not builder.info.splits:
        raise DataError(f"data.path={config.path!r} is not prepared in {where}; {_prepare(config)}")
    return builder


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], Any], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, Future[Any]]]:
    """Items with their futures, of which no more than `ahead` have begun before they are asked for."""
    waiting: deque[tuple[T, Future[Any]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
