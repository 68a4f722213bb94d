"""Where pictures come from: photographs inside installed packages, a directory tree, or a TFDS data set."""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar

import numpy as np
from etils import epath

from asymvq_jax.config import DataConfig
from asymvq_jax.errors import DataError
from asymvq_jax.files import images

log = logging.getLogger(__name__)

T = TypeVar("T")


class Source(Protocol):
    """Random access to pictures; picklable, so that worker processes can read it."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name for messages."""
        ...

    def read(self, index: int) -> np.ndarray:
        """The picture, (h, w, 3) uint8; raises images.ImageError where the file is corrupt or no picture."""
        ...


def open_source(config: DataConfig, *, train: bool) -> Source:
    """The training or the held-out half of the source that `config` names.

    Raises:
        DataError: the source is missing or empty.
    """
    if config.source == "photos":
        return Files(_photos(train), keep_decoded=True)
    if config.source == "folder":
        return Files(_folder(config, train))
    return TFDS(config, config.train_split if train else config.eval_split)


class Files:
    """Pictures in files; `keep_decoded` holds every one in memory once it was read, for a handful of them."""

    def __init__(self, paths: Sequence[epath.Path], *, keep_decoded: bool = False) -> None:
        self._paths = list(paths)
        self._decoded: dict[int, np.ndarray] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._paths[index])

    def read(self, index: int) -> np.ndarray:
        """See `Source.read`."""
        if self._decoded is None:
            return images.read(self._paths[index])
        if index not in self._decoded:
            self._decoded[index] = images.read(self._paths[index])
        return self._decoded[index]


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
_PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def _photos(train: bool) -> list[epath.Path]:
    paths = []
    for package, names in (TRAIN_PHOTOS if train else HELD_OUT_PHOTOS).items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"data.source='photos' needs {package}; install it with: pip install -r requirements.txt")
        folder = Path(spec.submodule_search_locations[0]) / _PHOTO_FOLDERS[package]
        paths += [epath.Path(folder / name) for name in names]
    return paths


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
HELD_OUT_EVERY = 20


def _folder(config: DataConfig, train: bool) -> list[epath.Path]:
    if config.eval_path:
        return list_pictures(config.path if train else config.eval_path, "data.path" if train else "data.eval_path")
    paths = list_pictures(config.path, "data.path")
    if len(paths) < 2:
        raise DataError(f"data.path={config.path!r} holds one picture only; name held-out ones with --data.eval_path")
    held_out = paths[::HELD_OUT_EVERY]
    return [p for p in paths if p not in set(held_out)] if train else held_out


def is_picture(path: PurePath) -> bool:
    """Whether the name ends as a picture's."""
    return path.suffix.lower() in SUFFIXES


def is_hidden(path: PurePath) -> bool:
    """Whether the name of a file, or of a directory that it lies in, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def visible_files(root: epath.Path) -> Iterator[epath.Path]:
    """All files under `root`, recursively, in no order; hidden ones are passed over.

    Raises:
        DataError: a directory cannot be read.
    """
    for folder, _, names in root.walk(on_error=_stop):
        yield from (folder / name for name in names if not is_hidden(folder.relative_to(root) / name))


def _stop(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}")


def list_pictures(path: str, field: str) -> list[epath.Path]:
    """All picture files under `path`, recursively, in sorted order; hidden files are passed over.

    Raises:
        DataError: the directory is missing, is a file, cannot be read, or holds no picture.
    """
    root = epath.Path(path)
    if not root.exists():
        raise DataError(f"{field}={path!r} does not exist")
    if not root.is_dir():
        raise DataError(f"{field}={path!r} is a file; expected a directory of pictures")
    files = list(visible_files(root))
    pictures = sorted((p for p in files if is_picture(p)), key=str)
    if not pictures:
        raise DataError(
            f"{field}={path!r} holds no pictures (found {len(files)} other files); expected {', '.join(SUFFIXES)}"
        )
    if len(files) > len(pictures):
        log.info("%s: %d files are no pictures by their names and are left out", path, len(files) - len(pictures))
    return pictures


class TFDS:
    """Pictures of a TFDS data set prepared as ArrayRecord, read without TensorFlow."""

    def __init__(self, config: DataConfig, split: str) -> None:
        # Here, because the import takes seconds and only this source needs it.
        import tensorflow_datasets as tfds

        self._name, self._split, self._key = config.path, split, config.image_key
        prepare = (
            f"prepare it with: tfds build {config.path} --file_format=array_record (what TFDS knows), or "
            "python -m asymvq_jax.data.build (your own pictures)"
        )
        data_dir = config.data_dir or None
        try:
            builder = tfds.builder(config.path, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            raise DataError(f"data.path={config.path!r} is no TFDS data set: {error}; {prepare}") from None
        if not builder.info.splits:
            where = config.data_dir or "TFDS's default directory"
            raise DataError(f"data.path={config.path!r} is not prepared in {where}; {prepare}")
        if config.image_key not in builder.info.features:
            keys = ", ".join(builder.info.features)
            raise DataError(f"data.image_key={config.image_key!r} is no feature of {config.path}; it has: {keys}")
        if split.split("[")[0] not in builder.info.splits:
            raise DataError(f"{config.path} has no split {split!r}; it has: {', '.join(builder.info.splits)}")
        # The picture stays bytes: decoding is ours, so that a corrupt record is found like a corrupt file.
        decoders = {config.image_key: tfds.decode.SkipDecoding()}
        try:
            self._source: Any = builder.as_data_source(split=split, decoders=decoders)
        except (NotImplementedError, ValueError) as error:
            raise DataError(f"data.path={config.path!r} cannot be read at random: {error}; {prepare}") from None
        if not len(self._source):
            raise DataError(f"{config.path} has no records in split {split!r}")

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        """Data set, split and record."""
        return f"{self._name}/{self._split}[{index}]"

    def read(self, index: int) -> np.ndarray:
        """See `Source.read`."""
        return images.decode(self._source[index][self._key], self.name(index))


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], Any], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, Future]]:
    """Items with their futures, of which no more than `ahead` have begun before they are asked for."""
    waiting: deque[tuple[T, Future]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
