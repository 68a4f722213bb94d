"""What an editor changed in a picture, found through the noise that it left everywhere else: `find_changes`.

An editor that returns a whole picture has changed all of it: its autoencoder or JPEG leaves noise that grows with the
local contrast, it may have moved the picture by a pixel and its tone by a level. So the noise is estimated from the
differences themselves, as a constant and a share of the local contrast, by a regression for a low quantile that an edit
of up to about two thirds of the picture does not reach. What exceeds it several times over, at any of several scales,
was edited.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from asymvq_jax.errors import InputError
from asymvq_jax.files.decoding import Array

# A change begins where the difference is so many times the noise, and reaches to where it is still so many times.
SEED, REACH = 6.0, 2.7
# Of a change that is this many times stronger, what is below a single time is its own blur.
STRONG = 40.0
# Scales at which differences are compared: halved so often.
SCALES = 4
# The quantile of the differences that the noise is estimated from, and what it is divided by to be their typical size.
QUANTILE, TYPICAL = 0.3, 0.8
# The least noise, levels of 255: that of rounding.
ROUNDING = 0.5
# Beyond this noise, levels of 255, nothing can be found.
MOST_NOISE = 24.0
# Shares of the picture: a larger change is taken for another picture, a smaller one for chance.
MOST, LEAST = 0.75, 2e-5
# By how much a mask is widened, px, so that the soft edge of an edit is in it.
MARGIN = 4
# Farthest shift, px, that is looked for, and the least that is undone.
FARTHEST, NEAREST = 8.0, 0.2


@dataclass(frozen=True)
class Changes:
    """What was found.

    Attributes:
        mask: (h, w, 1) uint8, 1 = changed.
        edited: (h, w, 3), the edited picture over the original: at its size, and moved onto it.
        noise: how much the rest of the picture differs, levels of 255.
        shift: by how much it was moved, px right and down.
    """

    mask: Array
    edited: Array
    noise: float
    shift: tuple[float, float]

    def describe(self) -> str:
        """Such as "3.1% of the picture was changed; the rest differs by 1.2 levels of 255"."""
        moved = f", moved by {self.shift[0]:+.1f}, {self.shift[1]:+.1f} px" if any(self.shift) else ""
        return f"{self.mask.mean():.2%} of the picture was changed; the rest differs by {self.noise:.1f} levels{moved}"


def find_changes(original: Array, edited: Array) -> Changes:
    """Finds what was edited.

    Args:
        original: (h, w, 3) uint8 or uint16.
        edited: the same picture after the edit, of either type; of another size if the shape is the same to 1%.

    Raises:
        InputError: the shapes differ; or nothing, or nearly everything, was changed.
    """
    size = original.shape[:2]
    _check_shapes(original, edited)
    before, after = (_levels(x) for x in (original, edited))
    if after.shape != before.shape:
        shrinks = size[0] < after.shape[0]
        after = cv2.resize(after, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    shift = _shift(before, after)
    if any(shift):
        after = _moved_back(before, after, shift)
    found, noise = _found(before, after)
    if noise > MOST_NOISE:
        raise InputError(
            f"the edited picture differs from the original by {noise:.0f} levels of 255 nearly everywhere, so that no "
            "part can be distinguished from the rest: give the mask of what was edited"
        )
    mask = _tidied(found)
    share = float(mask.mean())
    if share == 0:
        raise InputError(
            f"nothing of the edited picture stands out from the noise of {noise:.1f} levels of 255 by which it differs "
            "from the original: give the mask of what was edited"
        )
    if share > MOST:
        raise InputError(
            f"{share:.0%} of the picture was changed, too much to tell what was meant: give the mask of what was edited"
        )
    scale = np.float32(np.iinfo(original.dtype).max / 255)
    moved = np.round(np.clip(after, 0, 255) * scale).astype(original.dtype)
    return Changes(mask[..., None], moved, noise, shift)


def _check_shapes(original: Array, edited: Array) -> None:
    for name, array in (("original", original), ("edited picture", edited)):
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype not in (np.uint8, np.uint16):
            raise InputError(f"the {name} has shape {array.shape} and type {array.dtype}: expected (h, w, 3) uint8")
    (h, w), (eh, ew) = original.shape[:2], edited.shape[:2]
    # Rounding to the sides that an editor works with.
    if abs(h * ew - w * eh) > max(0.01 * w * eh, max(w, h, ew, eh)):
        raise InputError(
            f"the edited picture is {ew} x {eh} px and the original {w} x {h} px, of another shape: expected the whole "
            "picture, neither cut nor extended"
        )
    if min(h, w) < 16:
        raise InputError(f"a picture of {w} x {h} px is too small to tell changes from noise: expected 16 px or more")


def _levels(picture: Array) -> Array:
    return picture.astype(np.float32) * np.float32(255 / np.iinfo(picture.dtype).max)


def _shift(before: Array, after: Array) -> tuple[float, float]:
    """By how much the second is moved against the first, px right and down; zeros unless undoing it helps."""
    greys = [cv2.cvtColor(x / 255, cv2.COLOR_RGB2GRAY) for x in (before, after)]
    # Edges, so that an edit's area counts less than what it is made of.
    edges = [np.hypot(cv2.Sobel(g, cv2.CV_32F, 1, 0), cv2.Sobel(g, cv2.CV_32F, 0, 1)) for g in greys]
    window = cv2.createHanningWindow(edges[0].shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(np.minimum(edges[0], 1), np.minimum(edges[1], 1), window)
    if not NEAREST <= max(abs(x), abs(y)) <= FARTHEST:
        return 0.0, 0.0
    back = _moved_back(greys[0], greys[1], (x, y))
    was, now = (float(np.median(np.abs(greys[0] - g))) for g in (greys[1], back))
    return (float(x), float(y)) if now < 0.8 * was else (0.0, 0.0)


def _moved_back(before: Array, after: Array, shift: tuple[float, float]) -> Array:
    """The second without its shift; the first where that leaves nothing to see, at the borders."""
    height, width = before.shape[:2]
    move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    back = cv2.warpAffine(after, move, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    # Cubic interpolation reaches two pixels.
    x, y = (int(np.ceil(abs(length))) + 2 for length in shift)
    inside = np.zeros(before.shape, bool)
    inside[y : height - y, x : width - x] = True
    return np.where(inside, back, before)


def _found(before: Array, after: Array) -> tuple[Array, float]:
    """Where the two differ by more than noise at any scale, (h, w) bool; and the noise, levels of 255."""
    size = before.shape[:2]
    result: Array = np.zeros(size, np.uint8)
    noise = 0.0
    difference = after - before
    free = np.ones(size, bool)
    for scale in range(SCALES):
        if scale:
            # What a finer scale has found would spread over the coarser ones.
            here = cv2.resize(result, difference.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            spread = cv2.dilate(here, _disc(4))
            difference[spread > 0] = 0
            before, difference = cv2.pyrDown(before), cv2.pyrDown(difference)
            free = cv2.resize(spread, before.shape[1::-1], interpolation=cv2.INTER_NEAREST) == 0
        if min(before.shape[:2]) < 16 or not free.any():
            break
        energy = np.sqrt(_smooth(np.square(difference).mean(-1)))
        contrast = _contrast(before)
        constant, share = _noise(energy[free], contrast[free])
        expected = np.maximum(constant + share * contrast, ROUNDING)
        if not scale:
            noise = float(np.median(expected))
        certain = _certain(energy / expected, max(9, LEAST * size[0] * size[1] / 4**scale)).astype(np.uint8)
        result = np.maximum(result, cv2.resize(certain, size[::-1], interpolation=cv2.INTER_NEAREST))
    return result > 0, noise


def _smooth(plane: Array) -> Array:
    return np.asarray(cv2.GaussianBlur(plane, (0, 0), 1.5))


def _contrast(picture: Array) -> Array:
    """The local standard deviation, (h, w), over the pixels that a shift or a blur mixes."""
    mean = cv2.GaussianBlur(picture, (0, 0), 2)
    variance = cv2.GaussianBlur(np.square(picture), (0, 0), 2) - np.square(mean)
    return np.asarray(np.sqrt(np.maximum(variance.mean(-1), 0)))


def _noise(size: Array, contrast: Array) -> tuple[float, float]:
    """Constant and share of the contrast, of (n,) pixels: the line that `QUANTILE` of them lie below, brought up."""
    step = max(1, size.size // 2**14)
    y, x = (values[::step].astype(np.float64) for values in (size, contrast))
    terms = np.stack([np.ones_like(x), x], 1)
    line = np.array([np.quantile(y, QUANTILE), 0.0])
    # Iteratively weighted least squares for the quantile's asymmetric absolute error.
    for _ in range(50):
        residual = y - terms @ line
        weight = np.where(residual > 0, QUANTILE, 1 - QUANTILE) / np.maximum(np.abs(residual), 1e-3)
        weighted = terms.T * weight
        line = np.linalg.solve(weighted @ terms + 1e-9 * np.eye(2), weighted @ y)
        # Noise does not shrink with the contrast.
        if line[1] < 0:
            line = np.array([np.quantile(y, QUANTILE), 0.0])
            break
        line[0] = max(line[0], 0.0)
    return float(line[0]) / TYPICAL, float(line[1]) / TYPICAL


def _certain(excess: Array, least: float) -> Array:
    """Where the noise is exceeded, (h, w) bool: grown from where that is certain, without pieces below `least` px."""
    count, found = cv2.connectedComponents((excess > REACH).astype(np.uint8), connectivity=8)
    labels: npt.NDArray[np.int32] = found.astype(np.int32)
    peaks = np.zeros(count, np.float32)
    np.maximum.at(peaks, labels.ravel(), excess.ravel())
    certain = (peaks > SEED) & (np.bincount(labels.ravel(), minlength=count) >= least)
    certain[0] = False
    # The smoothing carries a strong change farther than a faint one.
    limit = np.clip(peaks / STRONG, REACH, SEED)
    return np.asarray(certain[labels] & (excess > limit[labels]))


def _tidied(found: Array) -> Array:
    """Pieces that lie close together as one, without holes, and widened: (h, w) uint8."""
    if not found.any():
        return found.astype(np.uint8)
    near = max(3, round(0.01 * min(found.shape)))
    padded = cv2.copyMakeBorder(found.astype(np.uint8), near, near, near, near, cv2.BORDER_CONSTANT)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, _disc(near))[near:-near, near:-near]
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(closed), contours, -1, 1, cv2.FILLED)
    return np.asarray(cv2.dilate(filled, _disc(MARGIN)))


def _disc(radius: int) -> Array:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)))
