"""LaMa's random masks (arXiv 2109.07161): irregular strokes or boxes. 1 = generate, 0 = preserve."""

from __future__ import annotations

import math

import cv2
import numpy as np

from asymvq_jax.config import MaskConfig

# LaMa's shortest segment and thinnest brush, px of a 256 px picture.
MIN_LENGTH, MIN_WIDTH = 10, 5


def random_mask(rng: np.random.Generator, size: int, config: MaskConfig) -> np.ndarray:
    """Draws one mask, a function of `rng` alone.

    Args:
        rng: the source of randomness.
        size: side of the square mask, px; all lengths scale with it, as they are given for 256 px.
        config: the distribution.

    Returns:
        (size, size, 1) uint8, 0 or 1.
    """
    mask = np.zeros((size, size, 1), np.uint8)
    if rng.random() < config.full_probability:
        return mask + np.uint8(1)
    if rng.random() * (config.strokes + config.boxes) < config.strokes:
        _draw_strokes(mask, rng, config)
    else:
        _draw_boxes(mask, rng, config)
    return mask


def _draw_strokes(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    size = mask.shape[0]
    scale = size / 256
    for stroke in range(rng.integers(config.stroke_count[0], config.stroke_count[1], endpoint=True)):
        x, y = (int(v) for v in rng.integers(0, size, 2))
        for _ in range(rng.integers(1, config.stroke_segments, endpoint=True)):
            angle = 0.01 + int(rng.integers(config.stroke_angle))
            if stroke % 2 == 0:
                angle = 2 * math.pi - angle
            length = (MIN_LENGTH + rng.integers(config.stroke_length)) * scale
            width = max(1, round((MIN_WIDTH + rng.integers(config.stroke_width)) * scale))
            end_x = int(np.clip(x + length * math.sin(angle), 0, size))
            end_y = int(np.clip(y + length * math.cos(angle), 0, size))
            cv2.line(mask, (x, y), (end_x, end_y), 1, width)
            x, y = end_x, end_y


def _draw_boxes(mask: np.ndarray, rng: np.random.Generator, config: MaskConfig) -> None:
    size = mask.shape[0]
    scale = size / 256
    margin = round(config.box_margin * scale)
    least, most = (max(1, round(side * scale)) for side in config.box_side)
    most = max(least, min(most, size - 2 * margin))
    for _ in range(rng.integers(config.box_count[0], config.box_count[1], endpoint=True)):
        height, width = rng.integers(least, most, 2, endpoint=True)
        top = rng.integers(margin, size - margin - height, endpoint=True)
        left = rng.integers(margin, size - margin - width, endpoint=True)
        mask[top : top + height, left : left + width] = 1
