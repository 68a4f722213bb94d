"""Metrics of one picture against the original, in the preserved and in the masked region.

Pictures are (h, w, 3) uint8, as they would be saved; masks (h, w, 1), 1 = generate, 0 = preserve. A metric whose region
is empty is NaN, and means over pictures leave it out.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from asymvq_jax.files.masks import generated
from asymvq_jax.inference.edges import rings

# Pixels on each side of the mask's edge that count for the boundary error: a band of 8 px.
BOUNDARY = 4


def _signed(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) / 127.5 - 1.0


def _mean(values: np.ndarray, region: np.ndarray) -> float:
    return float(values[region].mean()) if region.any() else float("nan")


def mean_squared_error(image: np.ndarray, original: np.ndarray, region: np.ndarray) -> float:
    """Mean squared difference on the [-1, 1] scale over a (h, w) boolean region; the preservation error, where kept."""
    return _mean(np.square(_signed(image) - _signed(original)), region)


def psnr(image: np.ndarray, original: np.ndarray, region: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over a (h, w) boolean region; infinite where the two are equal."""
    return decibels(mean_squared_error(image, original, region))


def decibels(error: float) -> float:
    """The PSNR of a mean squared error on the [-1, 1] scale."""
    return float("inf") if error == 0 else float(10 * np.log10(4.0 / error))


def ssim_map(image: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Structural similarity around each pixel (scikit-image, its 7 px window, colour channels averaged), (h, w).

    NaN where a picture has no window of 3 px.
    """
    if min(image.shape[:2]) < 3:
        return np.full(image.shape[:2], np.nan)
    window = _ssim_window(image)
    _, full = structural_similarity(original, image, channel_axis=-1, full=True, win_size=window, data_range=255)
    return np.asarray(full.mean(-1))


def _ssim_window(image: np.ndarray) -> int:
    return int(min(7, (min(image.shape[:2]) - 1) // 2 * 2 + 1))


def within_kept(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The pixels whose SSIM window holds kept pixels only, (h, w) bool: what is under the mask plays no part there."""
    reach = _ssim_window(image) // 2
    apart = cv2.dilate((~kept).astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    return np.asarray(apart == 0)


def boundary_band(mask: np.ndarray, width: int = BOUNDARY) -> np.ndarray:
    """The pixels within `width` px of the mask's edge, on both sides of it: (h, w) bool."""
    return np.asarray(np.logical_or(*rings(generated(mask)[..., 0], width)))


def boundary_error(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute error of the horizontal and vertical differences of neighbouring pixels, on the [-1, 1] scale.

    Taken over the band of 8 px across the mask's edge. It shows a seam only where the original is the truth on both
    sides, that is, where the latent is the original's own.
    """
    band = boundary_band(mask)
    difference = _signed(image) - _signed(original)
    across = [np.abs(np.diff(difference, axis=axis)) for axis in (0, 1)]
    both = [band[1:] & band[:-1], band[:, 1:] & band[:, :-1]]
    values = np.concatenate([a[b].ravel() for a, b in zip(across, both, strict=True)])
    return float(values.mean()) if values.size else float("nan")


def all_metrics(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Every metric of this module by name.

    Args:
        image: (h, w, 3) uint8.
        original: (h, w, 3) uint8.
        mask: (h, w, 1), 1 = generate, 0 = preserve.
    """
    masked = generated(mask)[..., 0]
    similarity = ssim_map(image, original)
    return {
        "preservation_error": mean_squared_error(image, original, ~masked),
        "psnr_preserved": psnr(image, original, ~masked) if (~masked).any() else float("nan"),
        "ssim_preserved": _mean(similarity, within_kept(image, ~masked)),
        "psnr_masked": psnr(image, original, masked) if masked.any() else float("nan"),
        "ssim_masked": _mean(similarity, masked),
        "boundary_error": boundary_error(image, original, mask),
    }
