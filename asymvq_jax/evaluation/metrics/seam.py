"""The tone step along a mask's contour: what pasting leaves, and what the preserved pixels alone cannot show.

A grid of cells cuts the contour into pieces, and every pixel near it belongs to the piece that is nearest. A piece's
step is the colour difference (CIEDE2000) between the mean colours of two thin rings, one on either side; its excess is
that step less the one that the original has in the same place, so that an edge which belongs to the picture counts for
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.evaluation.metrics.image import boundary_rings

# The rings are the pixels within so many px of the contour; the cells' side, px.
RING = 4
CELL = 16
# Rings with fewer pixels in a cell tell nothing.
LEAST = 8
# A piece is smooth where the original's lightness (0 to 100) varies less than this in its rings.
SMOOTH = 5.0


class Steps(NamedTuple):
    """The pieces of one or more contours: excess steps, (n,) in CIEDE2000 units, and whether each piece is smooth."""

    excess: np.ndarray
    smooth: np.ndarray

    def summary(self) -> dict[str, float]:
        """Mean and 95th percentile of all pieces, and the means of the smooth and of the textured; NaN without any."""

        def mean(values: np.ndarray) -> float:
            return float(values.mean()) if values.size else float("nan")

        return {
            "seam": mean(self.excess),
            "seam_p95": float(np.percentile(self.excess, 95)) if self.excess.size else float("nan"),
            "seam_smooth": mean(self.excess[self.smooth]),
            "seam_textured": mean(self.excess[~self.smooth]),
        }


class Contour:
    """The mask's contour in one original, against which any number of pictures are measured."""

    def __init__(self, original: np.ndarray, mask: np.ndarray) -> None:
        """Cuts the contour into pieces.

        Args:
            original: (h, w, 3) uint8.
            mask: (h, w, 1), 1 = generate, 0 = preserve; its contour is where it crosses 0.5.
        """
        self._rings = boundary_rings(mask, RING)
        self._cell = _cells(mask[..., 0] > 0.5)
        self._cells = int(self._cell.max()) + 1
        self._enough = np.all([self._count(ring) >= LEAST for ring in self._rings], axis=0)
        lab = rgb2lab(original)
        lightness, both = lab[..., :1], np.logical_or(*self._rings)
        variance = self._means(lightness**2, both) - self._means(lightness, both) ** 2
        self._smooth = variance[:, 0] < SMOOTH**2
        self._own = self._differences(lab)

    def steps(self, image: np.ndarray) -> Steps:
        """The excess step of every piece in (h, w, 3) uint8."""
        return Steps(self._differences(rgb2lab(image)) - self._own, self._smooth)

    def _differences(self, lab: np.ndarray) -> np.ndarray:
        return deltaE_ciede2000(*(self._means(lab, ring) for ring in self._rings))

    def _means(self, values: np.ndarray, ring: np.ndarray) -> np.ndarray:
        """Means over each piece's pixels of `ring`: (h, w, c) -> (n, c)."""
        cell = self._cell[ring]
        sums = np.stack([np.bincount(cell, v, self._cells) for v in np.moveaxis(values, -1, 0)[:, ring]], -1)
        return sums[self._enough] / self._count(ring)[self._enough, None]

    def _count(self, ring: np.ndarray) -> np.ndarray:
        return np.bincount(self._cell[ring], minlength=self._cells)


def _cells(inside: np.ndarray) -> np.ndarray:
    """For each pixel, the number of the grid's cell in which the nearest of the contour lies: (h, w)."""
    rows, columns = (np.arange(side) // CELL for side in inside.shape)
    cell = rows[:, None] * (columns[-1] + 1) + columns
    contour = inside & (cv2.dilate((~inside).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    if not contour.any():
        return cell
    _, label = cv2.distanceTransformWithLabels(
        (~contour).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_label = np.zeros(label.max() + 1, cell.dtype)
    of_label[label[contour]] = cell[contour]
    return of_label[label]


def join(steps: list[Steps]) -> Steps:
    """The pieces of several pictures."""
    return Steps(*(np.concatenate(values) for values in zip(*steps, strict=True)))
