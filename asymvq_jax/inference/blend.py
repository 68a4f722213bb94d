"""Ways of setting a decoded fill into a picture whose pixels outside the mask are to stay: `composite`.

None of them reads the original under the mask, which an editor does not have; the result does not depend on it.
A pixel counts as masked where the mask is above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import cv2
import jax.numpy as jnp
import numpy as np

from asymvq_jax.errors import InputError
from asymvq_jax.inference.edges import cells, distance, ring_means, rings
from asymvq_jax.inference.poisson import poisson

Blend = Literal["none", "feather", "multiband", "tone", "poisson"]
BLENDS: tuple[str, ...] = get_args(Blend)
# Those that mix the fill into the kept pixels near the edge; the others keep every one of them, bit for bit.
MIXING = ("feather", "multiband")
BAND = 8

# Octaves of the Laplacian pyramid.
OCTAVES = 5
# The tone field: side of the cells along the edge and width of the rings, px; fewest pixels of a ring in a cell.
CELL, RING, LEAST = 12, 3, 3
# Standard deviations that its constant and its linear terms are expected to have, levels of 0 to 255; degrees of
# freedom of the cells' Student t, its least scale, and how often the cells' weights are found anew.
PRIOR = (25.0, 10.0, 10.0)
FREEDOM, LEAST_SCALE, ROUNDS = 3.0, 2.0, 20


def composite(
    fill: np.ndarray, original: np.ndarray, mask: np.ndarray, blend: Blend = "feather", band: int = BAND
) -> np.ndarray:
    """Sets the fill into the original.

    Args:
        fill: (h, w, 3) uint8 or uint16, the whole decoded picture.
        original: the same shape and type; its pixels under the mask are not read.
        mask: (h, w, 1), 1 = generate, 0 = preserve.
        blend: none: the fill as it is under the mask. feather: and mixed into the `band` px around the mask, with a
            linear share. multiband: octave by octave, each over a width of its own (Burt and Adelson 1983), with the
            original continued under the mask by push and pull; around the mask as feather. tone: a constant and a
            slope of colour, fitted robustly to what fill and kept pixels differ by along the edge, is added to the
            fill. poisson: the fill's gradients, with the kept pixels as the boundary's values (Pérez et al. 2003).
        band: for feather and multiband, px.

    Returns:
        The picture, of the original's shape and type. Kept pixels that are farther than `band` from the mask, and with
        none, tone and poisson all of them, are the original's bit for bit.

    Raises:
        InputError: `blend` is unknown or `band` negative.
    """
    check_blend(blend, band)
    region = mask[..., 0] > 0
    if not region.any():
        return original.copy()
    most = np.iinfo(original.dtype).max
    scale = np.float32(most / 255)
    kept = np.where(region[..., None], np.float32(0), original.astype(np.float32) / scale)
    moved = _METHODS[blend](fill.astype(np.float32) / scale, kept, region)
    far = distance(~region)
    width = band if blend in MIXING else 0
    share = np.where(far > width, 1.0, far / (width + 1))[..., None].astype(np.float32)
    mixed = np.clip(np.round((moved * (1 - share) + kept * share) * scale), 0, most).astype(original.dtype)
    return np.where(share == 1, original, mixed)


def check_blend(blend: str, band: int) -> None:
    """Raises InputError unless the blend is known and the band is zero or more."""
    if blend not in BLENDS:
        raise InputError(f"blend={blend!r}: expected one of {', '.join(BLENDS)}")
    if band < 0:
        raise InputError(f"band={band}: expected zero or more pixels")


# Each takes the fill, the original with zeros under the mask, (h, w, 3) float32 in [0, 255], and the region, (h, w)
# bool, and returns a picture that holds under the mask and near it.


def _unchanged(fill: np.ndarray, original: np.ndarray, region: np.ndarray) -> np.ndarray:
    return fill


def _poisson(fill: np.ndarray, original: np.ndarray, region: np.ndarray) -> np.ndarray:
    return np.asarray(poisson(*(jnp.asarray(x)[None] for x in (fill, original, region[..., None])))[0])


def _multiband(fill: np.ndarray, original: np.ndarray, region: np.ndarray) -> np.ndarray:
    over, under = fill, push_pull(original, ~region)
    share: np.ndarray = region.astype(np.float32)
    details: list[np.ndarray] = []
    for _ in range(min(OCTAVES, min(region.shape).bit_length() - 1)):
        smaller = [cv2.pyrDown(x) for x in (over, under, share)]
        details.append(_mixed(over - _enlarged(smaller[0], over), under - _enlarged(smaller[1], under), share))
        over, under, share = smaller
    result = _mixed(over, under, share)
    for detail in reversed(details):
        result = _enlarged(result, detail) + detail
    return result


def _enlarged(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    return cv2.pyrUp(image, dstsize=like.shape[1::-1])


def _mixed(over: np.ndarray, under: np.ndarray, share: np.ndarray) -> np.ndarray:
    return np.asarray(over * share[..., None] + under * (1 - share[..., None]))


def push_pull(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Continues a picture smoothly to where it is not known (Gortler et al. 1996).

    Averages of what is known are taken over ever larger cells, and what is missing comes from the smallest cell that
    has any.

    Args:
        image: (h, w, 3) float32; what is not known is not read.
        known: (h, w) bool.

    Returns:
        (h, w, 3) float32, the image's where it is known; zeros where nothing is.
    """
    return _pull(np.where(known[..., None], image, np.float32(0)), known.astype(np.float32))


def _pull(average: np.ndarray, weight: np.ndarray) -> np.ndarray:
    if weight.min() >= 1 or max(weight.shape) == 1:
        return average
    below = cv2.pyrDown(weight)
    means = cv2.pyrDown(average * weight[..., None]) / np.maximum(below, 1e-6)[..., None]
    return _mixed(average, _enlarged(_pull(means, np.minimum(4 * below, 1)), average), weight)


def _tone(fill: np.ndarray, original: np.ndarray, region: np.ndarray) -> np.ndarray:
    count, pieces = cv2.connectedComponents(region.astype(np.uint8), connectivity=8)
    result = fill.copy()
    for number in range(1, count):
        piece = pieces == number
        result[piece] += _tone_field(fill, original, piece, region)[piece]
    return result


def _tone_field(fill: np.ndarray, original: np.ndarray, piece: np.ndarray, region: np.ndarray) -> np.ndarray:
    """What to add to the fill in one connected piece of the mask, (h, w, 3)."""
    inner, outer = rings(piece, RING)
    cell = cells(piece, CELL)
    inside, pixels_inside = ring_means(fill, inner, cell)
    outside, pixels_outside = ring_means(original, outer & ~region, cell)
    terms = _terms(piece)
    places, _ = ring_means(terms, inner, cell)
    used = (pixels_inside >= LEAST) & (pixels_outside >= LEAST)
    if not used.any():
        return np.zeros_like(fill)
    coefficients = _robust_fit(places[used], (outside - inside)[used])
    return np.asarray(terms @ coefficients, np.float32)


def _terms(piece: np.ndarray) -> np.ndarray:
    """1 and the two coordinates, which are -1 and 1 at the piece's borders: (h, w, 3)."""
    planes = [np.ones(piece.shape)]
    for axis, along in ((0, np.flatnonzero(piece.any(1))), (1, np.flatnonzero(piece.any(0)))):
        middle, half = (along[0] + along[-1]) / 2, max((along[-1] - along[0]) / 2, 1.0)
        coordinate = (np.arange(piece.shape[axis]) - middle) / half
        planes.append(np.broadcast_to(np.expand_dims(coordinate, 1 - axis), piece.shape))
    return np.stack(planes, -1)


def _robust_fit(terms: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """Coefficients of the terms with the greatest posterior, where the differences deviate by a Student t.

    A cell whose three channels lie far from the others' field, such as one where an object of the picture ends at the
    edge, loses its weight.

    Args:
        terms: (n, k).
        differences: (n, 3), levels.

    Returns:
        (k, 3).
    """
    precision = np.diag(1 / np.square(PRIOR))
    residual = differences - np.median(differences, axis=0)
    scale = max(LEAST_SCALE, 1.4826 * float(np.median(np.abs(residual))))
    coefficients = np.zeros((terms.shape[1], differences.shape[1]))
    for _ in range(ROUNDS):
        squares = np.square(residual).sum(1)
        weight = (FREEDOM + differences.shape[1]) / (FREEDOM + squares / scale**2)
        weighted = terms.T * weight / scale**2
        coefficients = np.linalg.solve(weighted @ terms + precision, weighted @ differences)
        residual = differences - terms @ coefficients
        scale = max(LEAST_SCALE, float(np.sqrt((weight[:, None] * np.square(residual)).mean())))
    return coefficients


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "none": _unchanged,
    "feather": _unchanged,
    "multiband": _multiband,
    "tone": _tone,
    "poisson": _poisson,
}
