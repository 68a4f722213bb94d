"""How well what was filled in agrees with the truth in tone and in grain."""

from __future__ import annotations

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.files.masks import generated
from asymvq_jax.inference.edges import rings

# Standard deviation of the blur after which colours are a tone, px.
TONE = 6.0
# Grain is what a blur of so many px takes away, in rings of so many px on either side of the mask's edge. A variance
# below the least, in levels squared, is as good as none.
FINE, RING, LEAST = 1.0, 8, 0.5


def fill_tone(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean colour difference (CIEDE2000) from the truth under the mask, both blurred among the masked pixels only.

    Args:
        image: (h, w, 3) uint8.
        truth: (h, w, 3) uint8.
        mask: (h, w, 1), 1 = generate, 0 = preserve.

    Returns:
        NaN where nothing is masked.
    """
    inside = generated(mask)[..., 0]
    if not inside.any():
        return float("nan")
    tones = [rgb2lab(blur_within(x.astype(np.float32), inside, TONE)[inside] / 255) for x in (image, truth)]
    return float(deltaE_ciede2000(*tones).mean())


def grain(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """The ratio of fine variance inside to outside the mask's edge, to the truth's ratio, in octaves.

    Each side is blurred by itself, so that a step at the edge does not count as grain.

    Args:
        image, truth, mask: see `fill_tone`.

    Returns:
        0: as in the truth; 1: twice the variance; -1: half. NaN where there is no edge.
    """
    inside = generated(mask)[..., 0]
    inner, outer = rings(inside, RING)
    if not inner.any():
        return float("nan")
    sides = ((inside, inner), (~inside, outer))
    (inward, outward), (true_inward, true_outward) = (
        [_fine_variance(x, side, ring) for side, ring in sides] for x in (image, truth)
    )
    return float(np.log2(inward / outward) - np.log2(true_inward / true_outward))


def _fine_variance(image: np.ndarray, side: np.ndarray, ring: np.ndarray) -> float:
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    return float(np.square(grey - blur_within(grey, side, FINE))[ring].mean()) + LEAST


def blur_within(image: np.ndarray, region: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur of standard deviation `radius` px over the pixels of a region alone.

    Args:
        image: (h, w, c) float32.
        region: (h, w) bool.
        radius: px.

    Returns:
        (h, w, c) float32; outside the region it means nothing.
    """
    weight = region.astype(np.float32)
    total = cv2.GaussianBlur(weight, (0, 0), radius)
    blurred = cv2.GaussianBlur(image * weight[..., None], (0, 0), radius).reshape(image.shape)
    return np.asarray(blurred / np.maximum(total, 1e-6)[..., None])
