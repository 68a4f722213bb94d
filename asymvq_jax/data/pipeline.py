"""Batches of pictures and masks with Grain: every example is a function of (seed, position in the run)."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import cv2
import grain
import numpy as np
from absl import flags
from etils import epath

from asymvq_jax.config import DataConfig, MaskConfig
from asymvq_jax.data.identity import Identity, identify
from asymvq_jax.data.masks import find_files, random_mask
from asymvq_jax.data.sources import Once, Source, by_itself, open_source, open_sources, within
from asymvq_jax.errors import DataError, ImageError
from asymvq_jax.files.addresses import in_bucket

log = logging.getLogger(__name__)

# Pictures tried for one example before the run gives up: more than chance asks for where a part of the data is sound.
TRIES = 1_000
# Of the unreadable files that an example stepped over, so many are reported.
REPORTED = 8
# Masks drawn for one held-out example before the run gives up.
MASK_ATTEMPTS = 100
Example = dict[str, np.ndarray]


class Inputs(NamedTuple):
    """What examples are made of."""

    train: Source
    held_out: Source
    masks: Sequence[epath.Path]

    def identities(self, config: DataConfig) -> dict[str, Identity]:
        """What a resumed run compares, by its name in messages."""
        found = {"training pictures": self.train.identity(), "held-out pictures": self.held_out.identity()}
        if self.masks:
            found["masks"] = identify(within(path, epath.Path(config.mask.path)) for path in self.masks)
        return found


def open_inputs(config: DataConfig, kept: epath.Path | None = None, once: Once = by_itself) -> Inputs:
    """Lists the data once, for training and evaluation alike; see `open_sources`."""
    masks = once(lambda: [*map(os.fspath, find_files(config.mask))])
    return Inputs(*open_sources(config, kept, once), [*map(epath.Path, masks)])


def training_batches(
    config: DataConfig, seed: int, *, process_index: int, process_count: int, inputs: Inputs | None = None
) -> grain.DatasetIterator[Example]:
    """An endless iterator over this process's share of the global batches.

    The global batch at a step does not depend on the number of processes; each takes its consecutive rows.
    Every epoch has its own permutation.

    Args:
        config: the data.
        seed: of the order, the crops and the masks.
        process_index: which part of every batch.
        process_count: of how many equal parts.
        inputs: what `open_inputs` returned for this config, if it is there already.

    Returns:
        An iterator over dictionaries: "image" (b, h, w, 3) uint8, "mask" (b, h, w, 1) uint8 in {0, 1}, "skipped"
        (b, REPORTED) int32, the indices of unreadable files that an example stepped over, padded with -1, and "small"
        (b,) int32, how many pictures below data.min_side it stepped over; b = batch_size / process_count. Its
        get_state() is a dictionary that JSON can hold.

    Raises:
        DataError: the source or a directory of masks is missing, or the processes cannot share the batch evenly.
    """
    if config.batch_size % process_count:
        raise DataError(f"data.batch_size={config.batch_size}: expected a multiple of the {process_count} processes")
    source, _, masks = inputs or open_inputs(config)
    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(partial(_example, source, masks, config), seed=seed)
        .batch(config.batch_size // process_count, drop_remainder=True)[process_index::process_count]
    )
    threads = config.threads or (16 if any(map(in_bucket, (config.path, config.data_dir))) else 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4 * config.prefetch, threads))
    batches = examples.to_iter_dataset(options)
    if config.workers:
        # Grain's workers read absl flags (grain 0.2.18, Nov 2026), which only absl's own app.run parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch),
            worker_init_fn=partial(_end_with, os.getpid()),
        )
    return iter(batches)


def _end_with(trainer: int, *_: int) -> None:
    """Ends this worker process soon after the process `trainer` that started it, even one that was killed."""

    def watch() -> None:
        # Not a signal of the system on the parent's death, which comes when the thread ends that started the worker.
        while os.getppid() == trainer:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _example(
    source: Source, mask_files: Sequence[epath.Path], config: DataConfig, index: int, rng: np.random.Generator
) -> Example:
    found = _read(source, config.min_side, int(index), rng)
    reported = found.unreadable[:REPORTED]
    image = _crop(found.image, config.image_size, rng.uniform(*config.crop), rng)
    return {
        "image": _augment(image, config, rng),
        "mask": random_mask(rng, config.image_size, config.mask, mask_files),
        "skipped": np.array(reported + [-1] * (REPORTED - len(reported)), np.int32),
        "small": np.array(found.small, np.int32),
    }


class _Found(NamedTuple):
    """A usable picture, and what was stepped over to find it."""

    image: np.ndarray
    unreadable: list[int]
    small: int


def _read(source: Source, min_side: int, index: int, rng: np.random.Generator) -> _Found:
    """The picture at `index`, or at a random other index where that one cannot be read or is too small."""
    unreadable: list[int] = []
    small = 0
    tried = set[int]()
    for _ in range(TRIES):
        last = index
        try:
            image = source.read(index)
            if min(image.shape[:2]) >= max(min_side, 1):
                return _Found(image, unreadable, small)
            small += 1
            reason = f"its shorter side is below data.min_side={min_side}"
        except ImageError as error:
            unreadable.append(index)
            reason = str(error)
        tried.add(index)
        if len(tried) == len(source):
            break
        index = int(rng.integers(len(source)))
    raise DataError(
        f"{len(unreadable) + small} pictures in a row cannot be used ({small} of them below data.min_side={min_side}); "
        f"the last is {source.name(last)}: {reason}. Check the data and "
        "data.min_side; asymvq build-data --min-side makes a data set without small pictures"
    )


def _crop(image: np.ndarray, size: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random square with `share` of the shorter side, resized by area to (size, size, 3)."""
    height, width, _ = image.shape
    side = max(1, int(share * min(height, width)))
    top = int(rng.integers(0, height - side, endpoint=True))
    left = int(rng.integers(0, width - side, endpoint=True))
    return cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)


def _augment(image: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Mirrored, and in other colours, with the config's probabilities; draws nothing for a probability of 0."""
    if config.mirror and rng.random() < config.mirror:
        image = image[:, ::-1]
    if config.recolour and rng.random() < config.recolour:
        gains, offsets = rng.uniform(0.7, 1.1, 3), rng.uniform(-16, 16, 3)
        image = np.clip(image[..., rng.permutation(3)] * gains + offsets, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)


def held_out(config: DataConfig, count: int, seed: int, inputs: Inputs | None = None) -> Example:
    """A fixed set of held-out examples: picture i % n, first its centre square, then random crops.

    Args:
        config: the data.
        count: how many examples.
        seed: of the crops and masks.
        inputs: what `open_inputs` returned for this config, if it is there already.

    Returns:
        "image" (count, h, w, 3) uint8 and "mask" (count, h, w, 1) uint8; no mask is full or empty.

    Raises:
        DataError: the held-out source or a directory of masks is missing, or too much of it is unusable.
    """
    source = inputs.held_out if inputs else open_source(config, train=False)
    mask_files = inputs.masks if inputs else find_files(config.mask)
    masks = dataclasses.replace(config.mask, full_probability=0.0)
    result: dict[str, list[np.ndarray]] = {"image": [], "mask": []}
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        image, unreadable, _ = _read(source, config.min_side, i % len(source), rng)
        for index in unreadable:
            log.warning("held out: %s is skipped: %s", source.name(index), why_unreadable(source, index))
        if i < len(source):
            height, width, _ = image.shape
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            image = image[top : top + side, left : left + side]
        share = 1.0 if i < len(source) else rng.uniform(*config.crop)
        result["image"].append(_crop(image, config.image_size, share, rng))
        result["mask"].append(_partial_mask(rng, config.image_size, masks, mask_files))
    return {name: np.stack(values) for name, values in result.items()}


def _partial_mask(rng: np.random.Generator, size: int, config: MaskConfig, files: Sequence[epath.Path]) -> np.ndarray:
    """A mask that is neither full nor empty."""
    for _ in range(MASK_ATTEMPTS):
        mask = random_mask(rng, size, config, files)
        if mask.any() and not mask.all():
            return mask
    raise DataError(f"data.mask gave {MASK_ATTEMPTS} full or empty masks in a row; held-out pictures need others")


def why_unreadable(source: Source, index: int) -> str:
    """Why a picture of a source cannot be read; workers hand on its index only."""
    try:
        source.read(index)
    except ImageError as error:
        return str(error).removeprefix(f"{source.name(index)} ")
    return "it could not be read then, and can be read now"


class SkippedFiles:
    """Counts what examples stepped over, names each file once with its reason, and stops the run at too many."""

    # The share is judged once so many files were read, or all of a smaller source.
    MIN_EXAMINED = 100

    def __init__(self, source: Source, max_share: float) -> None:
        self._source, self._max_share = source, max_share
        self._examined, self._small = 0, 0
        self._unreadable: dict[int, str] = {}
        self._warned_small = 0.0

    def update(self, skipped: np.ndarray, small: np.ndarray) -> None:
        """Takes note of one batch.

        Args:
            skipped: (b, REPORTED) indices of unreadable files, padded with -1.
            small: (b,) pictures below data.min_side.

        Raises:
            DataError: more than data.max_corrupt_share of the files read cannot be used.
        """
        found = skipped[skipped >= 0].tolist()
        self._examined += len(skipped) + len(found)
        self._small += int(small.sum())
        for index in sorted(set(found) - self._unreadable.keys()):
            self._unreadable[index] = why_unreadable(self._source, index)
            count, name = len(self._unreadable), self._source.name(index)
            log.warning("unreadable file %d: %s is skipped: %s", count, name, self._unreadable[index])
        files = min(self._examined, len(self._source))
        if files < min(self.MIN_EXAMINED, len(self._source)):
            return
        self._warn_small()
        if len(self._unreadable) > self._max_share * files:
            such_as = "; ".join(f"{self._source.name(i)}: {why}" for i, why in sorted(self._unreadable.items())[:3])
            raise DataError(
                f"{len(self._unreadable)} of {files} files read cannot be used, more than "
                f"data.max_corrupt_share={self._max_share}; such as {such_as}"
            )

    def _warn_small(self) -> None:
        """Says which share of the pictures is too small, once it is known and whenever it has doubled."""
        share = self._small / (self._small + self._examined)
        if share > 2 * self._warned_small:
            self._warned_small = share
            log.warning(
                "%.1f%% of the pictures read are below data.min_side and are stepped over; "
                "asymvq build-data --min-side makes a data set without them",
                100 * share,
            )
