"""Batches of pictures and masks with Grain: every example is a function of (seed, position in the run)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial

import cv2
import grain
import numpy as np
from absl import flags
from etils import epath

from asymvq_jax.config import DataConfig, MaskConfig
from asymvq_jax.data.masks import find_files, random_mask
from asymvq_jax.data.sources import Source, open_source
from asymvq_jax.errors import DataError, ImageError

log = logging.getLogger(__name__)

# Files tried for one example before the run gives up.
ATTEMPTS = 8
# Masks drawn for one held-out example before the run gives up.
MASK_ATTEMPTS = 100
Example = dict[str, np.ndarray]


def training_batches(
    config: DataConfig, seed: int, *, process_index: int, process_count: int
) -> grain.DatasetIterator[Example]:
    """An endless iterator over this process's share of the global batches.

    The global batch at a step does not depend on the number of processes; each takes its consecutive rows.
    Every epoch has its own permutation.

    Returns:
        An iterator over dictionaries: "image" (b, h, w, 3) uint8, "mask" (b, h, w, 1) uint8 in {0, 1} and "skipped"
        (b, ATTEMPTS) int32, the indices of the corrupt files that an example stepped over, padded with -1;
        b = batch_size / process_count. Its get_state() is a dictionary that JSON can hold.

    Raises:
        DataError: the source or a directory of masks is missing, or the processes cannot share the batch evenly.
    """
    if config.batch_size % process_count:
        raise DataError(f"data.batch_size={config.batch_size}: expected a multiple of the {process_count} processes")
    source = open_source(config, train=True)
    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(partial(_example, source, find_files(config.mask), config), seed=seed)
        .batch(config.batch_size // process_count, drop_remainder=True)[process_index::process_count]
    )
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4 * config.prefetch)
    batches = examples.to_iter_dataset(options)
    if config.workers:
        # Grain's workers read absl flags (grain 0.2.18, Nov 2026), which only absl's own app.run parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch)
        )
    return iter(batches)


def _example(
    source: Source, mask_files: Sequence[epath.Path], config: DataConfig, index: int, rng: np.random.Generator
) -> Example:
    image, skipped = _read(source, config.min_side, int(index), rng)
    return {
        "image": _crop(image, config.image_size, rng.uniform(*config.crop), rng),
        "mask": random_mask(rng, config.image_size, config.mask, mask_files),
        "skipped": np.array(skipped + [-1] * (ATTEMPTS - len(skipped)), np.int32),
    }


def _read(source: Source, min_side: int, index: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """The picture at `index`, or at a random other index where that one is corrupt or too small."""
    corrupt: list[int] = []
    for _ in range(ATTEMPTS):
        try:
            image = source.read(index)
            if min(image.shape[:2]) >= max(min_side, 1):
                return image, corrupt
            reason = f"its shorter side is below data.min_side={min_side}"
        except ImageError as error:
            corrupt.append(index)
            reason = str(error)
        last = index
        index = int(rng.integers(len(source)))
    raise DataError(
        f"{ATTEMPTS} pictures in a row cannot be used; the last is {source.name(last)}: {reason}. "
        "Check the data and data.min_side"
    )


def _crop(image: np.ndarray, size: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """A random square with `share` of the shorter side, resized by area to (size, size, 3)."""
    height, width, _ = image.shape
    side = max(1, int(share * min(height, width)))
    top = int(rng.integers(0, height - side, endpoint=True))
    left = int(rng.integers(0, width - side, endpoint=True))
    return cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)


def held_out(config: DataConfig, count: int, seed: int) -> Example:
    """A fixed set of held-out examples: picture i % n, first its centre square, then random crops.

    Args:
        config: the data.
        count: how many examples.
        seed: of the crops and masks.

    Returns:
        "image" (count, h, w, 3) uint8 and "mask" (count, h, w, 1) uint8; no mask is full or empty.

    Raises:
        DataError: the held-out source or a directory of masks is missing, or too much of it is unusable.
    """
    source, mask_files = open_source(config, train=False), find_files(config.mask)
    masks = dataclasses.replace(config.mask, full_probability=0.0)
    result: dict[str, list[np.ndarray]] = {"image": [], "mask": []}
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        image, corrupt = _read(source, config.min_side, i % len(source), rng)
        for index in corrupt:
            log.warning("held out: %s is corrupt and is replaced", source.name(index))
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


class CorruptFiles:
    """Counts and names corrupt files, and stops the run when there are too many."""

    # The share is judged once so many files were read, or all of a smaller source.
    MIN_EXAMINED = 100

    def __init__(self, source: Source, max_share: float) -> None:
        self._source, self._max_share = source, max_share
        self._examined, self._corrupt = 0, set[int]()

    def update(self, skipped: np.ndarray, examples: int) -> None:
        """Takes note of one batch.

        Args:
            skipped: (b, ATTEMPTS) indices of corrupt files, padded with -1.
            examples: pictures in the batch.

        Raises:
            DataError: more than data.max_corrupt_share of the files read are corrupt.
        """
        found = skipped[skipped >= 0].tolist()
        self._examined += examples + len(found)
        for index in sorted(set(found) - self._corrupt):
            self._corrupt.add(index)
            log.warning("corrupt file %d: %s is skipped", len(self._corrupt), self._source.name(index))
        files = min(self._examined, len(self._source))
        if files >= min(self.MIN_EXAMINED, len(self._source)) and len(self._corrupt) > self._max_share * files:
            names = ", ".join(self._source.name(i) for i in sorted(self._corrupt)[:3])
            raise DataError(
                f"{len(self._corrupt)} of {files} files read are corrupt, more than "
                f"data.max_corrupt_share={self._max_share}; such as {names}"
            )
