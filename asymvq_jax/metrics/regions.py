"""Metrics of one picture against its original: in the preserved region, in the masked one, and across their edge.

All take (h, w, 3) uint8 pictures, as files hold them, and a mask (h, w, 1), nonzero = generate, 0 = preserve. A metric
whose region has no pixel is NaN; `average` leaves such pictures out and counts the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

# Pixels on each side of the mask's edge that the boundary error looks at.
BOUNDARY = 4


class Average(NamedTuple):
    """A mean over the pictures for which the metric is defined, and how many these are."""

    mean: float
    count: int


def compare(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """All metrics of this module, by name.

    Args:
        image: (h, w, 3) uint8, the picture to judge.
        original: (h, w, 3) uint8.
        mask: (h, w, 1), nonzero = generate, 0 = preserve.
    """
    masked = mask[..., 0] > 0
    similarity = similarity_map(image, original)
    return {
        "preservation_error": preservation_error(image, original, mask),
        "psnr_preserved": psnr(image, original, ~masked),
        "ssim_preserved": _mean(similarity[~masked]),
        "psnr_masked": psnr(image, original, masked),
        "ssim_masked": _mean(similarity[masked]),
        "boundary_error": boundary_error(image, original, mask),
    }


def preservation_error(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared error over the preserved pixels and the channels, on the [-1, 1] scale.

    The paper reports it without a definition in public code. This one puts Stable Diffusion's own autoencoder where
    the paper does (1082.8e-5, that is 25.7 dB).
    """
    return _mean(np.square(_difference(image, original)[mask[..., 0] == 0] / 127.5))


def psnr(image: np.ndarray, original: np.ndarray, region: np.ndarray) -> float:
    """scikit-image's peak signal-to-noise ratio over the pixels of `region`, (h, w) bool, in dB; inf where equal."""
    if not region.any():
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(original[region], image[region], data_range=255))


def similarity_map(image: np.ndarray, original: np.ndarray) -> np.ndarray:
    """scikit-image's structural similarity at each pixel and channel, (h, w, 3).

    The window is the default one: uniform, 7 px wide (less in a smaller picture). A window around a pixel near the
    mask's edge reaches across it, so that even an untouched pixel there can score below 1. NaN where a side is below
    3 px, as no window fits.
    """
    window = min(7, (min(image.shape[:2]) - 1) // 2 * 2 + 1)
    if window < 3:
        return np.full(image.shape, np.nan)
    return structural_similarity(original, image, win_size=window, data_range=255, channel_axis=-1, full=True)[1]


def boundary_error(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute error of the image's gradient in a band across the mask's edge, in 8-bit levels per pixel.

    The gradient is the difference of neighbouring pixels, to the right and downwards. The band holds the preserved
    pixels at most 4 px from a masked one, and the masked pixels at most 4 px from a preserved one (Euclidean); a
    difference counts where both its pixels are in the band. A seam where one side is s levels too bright adds s at
    every pair of pixels across it; detail that the decoder smooths or invents adds up as well. It tells something
    about seams only where the masked region shows what the original does: for a latent of the original itself.
    """
    masked = mask[..., 0] > 0
    band = (edge_distance(masked) <= BOUNDARY) & (edge_distance(~masked) <= BOUNDARY)
    error = _difference(image, original)
    across = np.abs(np.diff(error, axis=1))[band[:, 1:] & band[:, :-1]]
    down = np.abs(np.diff(error, axis=0))[band[1:] & band[:-1]]
    return _mean(np.concatenate([across, down]))


def edge_distance(region: np.ndarray) -> np.ndarray:
    """Euclidean distance in px from each pixel to the nearest one of `region`, (h, w) float32: 0 inside, inf without.

    Args:
        region: (h, w) bool.
    """
    if not region.any():
        return np.full(region.shape, np.inf, np.float32)
    return cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def average(pictures: Sequence[dict[str, float]]) -> dict[str, Average]:
    """Averages each metric over the pictures for which it is defined; NaN and 0 where there is none."""
    result = {}
    for name in pictures[0]:
        values = [p[name] for p in pictures if not np.isnan(p[name])]
        result[name] = Average(float(np.mean(values)) if values else float("nan"), len(values))
    return result


def _difference(image: np.ndarray, original: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) - original.astype(np.float64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
