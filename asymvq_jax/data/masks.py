"""LaMa's random masks (arXiv 2109.07161) and masks from files. 1 = generate, 0 = preserve.

asymvq masks --out docs/masks.png draws samples.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath

from asymvq_jax.config import MASK_PRESETS, MaskConfig
from asymvq_jax.data.sources import list_pictures
from asymvq_jax.errors import DataError, ImageError, first_line
from asymvq_jax.files import images
from asymvq_jax.files.masks import generated

log = logging.getLogger(__name__)

# LaMa's shortest segment and thinnest brush, px at the configuration's resolution.
MIN_LENGTH, MIN_WIDTH = 10, 5
# Mask files tried for one mask before the run gives up.
FILE_ATTEMPTS = 100


def find_files(config: MaskConfig) -> list[epath.Path]:
    """The mask pictures that the mixture draws from; none where it has no files.

    Raises:
        DataError: data.mask.path is missing, is a file, or holds no picture.
    """
    return list_pictures(config.path, "data.mask.path") if config.files else []


def random_mask(
    rng: np.random.Generator, size: int, config: MaskConfig, files: Sequence[epath.Path] = ()
) -> np.ndarray:
    """Draws one mask, a function of `rng` and the files alone.

    Args:
        rng: the source of randomness.
        size: side of the square mask, px.
        config: the distribution.
        files: what `find_files` returns for it.

    Returns:
        (size, size, 1) uint8, 0 or 1.

    Raises:
        DataError: hardly any of the mask files can be read.
    """
    mask = np.zeros((size, size, 1), np.uint8)
    if rng.random() < config.full_probability:
        return mask + np.uint8(1)
    weights = config.weights
    kind = rng.choice([*weights], p=np.divide([*weights.values()], sum(weights.values())))
    if kind == "files":
        mask = _draw_file(rng, size, files)
    else:
        _DRAW[kind](mask, rng, config)
    if config.invert_probability and rng.random() < config.invert_probability:
        mask = 1 - mask
    return mask


def _draw_file(rng: np.random.Generator, size: int, files: Sequence[epath.Path]) -> np.ndarray:
    """A mask file's mask; files that cannot be read are named, and others drawn instead."""
    for _ in range(FILE_ATTEMPTS):
        path = files[int(rng.integers(len(files)))]
        try:
            return _read(path, size)
        except (ImageError, OSError) as error:
            reason = f"{path} {first_line(error).removeprefix(f'{path} ')}"
            _name_once(reason)
    raise DataError(f"data.mask.path: {FILE_ATTEMPTS} files in a row cannot be read; the last: {reason}")


@functools.cache
def _name_once(reason: str) -> None:
    log.warning("a mask is skipped: %s", reason)


def _read(path: epath.Path, size: int) -> np.ndarray:
    grey = cv2.resize(images.read_mask(path, soft=True), (size, size), interpolation=cv2.INTER_AREA)
    return generated(grey.reshape(size, size, 1)).astype(np.uint8)


Point = tuple[int, int]


def _walks(
    rng: np.random.Generator, size: int, config: MaskConfig, count: tuple[int, int], lengths: int, widths: int
) -> Iterator[tuple[Point, Point, int]]:
    """The segments of random walks: start, end, and the brush's width."""
    scale = size / config.resolution
    for walk in range(rng.integers(*count, endpoint=True)):
        x, y = (int(v) for v in rng.integers(0, size, 2))
        for _ in range(rng.integers(1, config.stroke_segments, endpoint=True)):
            angle = 0.01 + int(rng.integers(config.stroke_angle))
            if walk % 2 == 0:
                angle = 2 * math.pi - angle
            length = (MIN_LENGTH + rng.integers(lengths)) * scale
            width = max(1, round((MIN_WIDTH + rng.integers(widths)) * scale))
            end_x = int(np.clip(x + length * math.sin(angle), 0, size))
            end_y = int(np.clip(y + length * math.cos(angle), 0, size))
            yield (x, y), (end_x, end_y), width
            x, y = end_x, end_y


def _draw_strokes(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    walks = _walks(rng, len(mask), config, config.stroke_count, config.stroke_length, config.stroke_width)
    for start, end, width in walks:
        cv2.line(mask, start, end, 1, width)


def _draw_squares(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    walks = _walks(rng, len(mask), config, config.square_count, config.square_length, config.square_width)
    for (x, y), _, width in walks:
        half = max(1, width // 2)
        # Cut off at the edges; LaMa loses squares that reach over the left or upper one.
        mask[max(0, y - half) : y + half, max(0, x - half) : x + half] = 1


def _draw_boxes(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    size = len(mask)
    scale = size / config.resolution
    least, most = (max(1, round(side * scale)) for side in config.box_side)
    margin = min(round(config.box_margin * scale), (size - least) // 2)
    most = max(least, min(most, size - 2 * margin))
    for _ in range(rng.integers(*config.box_count, endpoint=True)):
        height, width = rng.integers(least, most, 2, endpoint=True)
        top = rng.integers(margin, size - margin - height, endpoint=True)
        left = rng.integers(margin, size - margin - width, endpoint=True)
        mask[top : top + height, left : left + width] = 1


def _draw_superres(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    for lines in (mask, mask.swapaxes(0, 1)):
        step = int(rng.integers(*config.superres_step, endpoint=True))
        width = rng.integers(config.superres_width[0], min(step - 1, config.superres_width[1]), endpoint=True)
        offset = rng.integers(step)
        lines[(np.arange(len(mask)) - offset) % step < width] = 1


def _draw_outpainting(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    # As in LaMa the widest margin is a pixel short of the most.
    least, most = (int(share * len(mask)) for share in config.outpainting_padding)
    paddings = rng.integers(max(1, least), max(2, least + 1, most), 4)
    probabilities = np.array(config.outpainting_sides)
    masked = rng.random(4) < probabilities
    if not masked.any():
        masked[rng.choice(4, p=probabilities / probabilities.sum())] = True
    transposed = mask.swapaxes(0, 1)
    sides = (transposed, mask, transposed[::-1], mask[::-1])
    for side, padding in zip(np.flatnonzero(masked), paddings[masked], strict=True):
        sides[side][:padding] = 1


_DRAW = {
    "strokes": _draw_strokes,
    "boxes": _draw_boxes,
    "squares": _draw_squares,
    "superres": _draw_superres,
    "outpainting": _draw_outpainting,
}


def samples() -> np.ndarray:
    """A grid of masks, light = generate: a column for every kind, their mixture and LaMa's presets of 256 px.

    Returns:
        (h, w, 3) uint8.
    """
    none = dict.fromkeys(MaskConfig().weights, 0.0)
    distributions = {kind: none | {kind: 1.0} for kind in _DRAW}
    distributions["mixed"] = none | dict.fromkeys(_DRAW, 1.0)
    distributions |= {name: preset for name, preset in MASK_PRESETS.items() if name.endswith("_256")}
    rng = np.random.default_rng(0)
    columns = []
    for name, fields in distributions.items():
        values: dict[str, Any] = fields
        config = MaskConfig(**values, full_probability=0.0)
        masks = [random_mask(rng, 128, config) for _ in range(4)]
        # Not white, which the gaps between the cells are.
        columns.append((name, [np.where(mask.repeat(3, axis=-1), np.uint8(200), np.uint8(0)) for mask in masks]))
    return images.grid(columns)
