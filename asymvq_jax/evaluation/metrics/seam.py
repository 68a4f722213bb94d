"""The tone step along a mask's contour: what pasting leaves, and what the preserved pixels alone cannot show.

A grid of cells cuts the contour into pieces, and every pixel near it belongs to the piece that is nearest. A piece's
step is the colour difference (CIEDE2000) between the mean colours of two thin rings, one on either side; its excess is
that step less the one that the truth has in the same place, so that an edge which belongs to the picture counts for
nothing. An edge that was blurred away has less than no excess, and must not make up for a step that shows elsewhere:
what counts is the mean absolute excess.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.files.masks import generated
from asymvq_jax.inference.edges import cells, ring_means, rings

# The rings are the pixels within so many px of the contour; the cells' side, px.
RING = 4
CELL = 16
# Rings with fewer pixels in a cell show nothing.
LEAST = 8
# A piece is smooth where the truth's lightness (0 to 100) varies less than this in its rings.
SMOOTH = 5.0


class Steps(NamedTuple):
    """The pieces of one or more contours: excess steps, (n,) in CIEDE2000 units, and whether each piece is smooth."""

    excess: np.ndarray
    smooth: np.ndarray

    def summary(self) -> dict[str, float]:
        """Means and 95th percentile over the pieces; NaN without any.

        Returns:
            step: the mean absolute excess; step_p95: the 95th percentile of it; step_signed: the mean excess;
            step_smooth and step_textured: the mean absolute excess of smooth and of textured pieces.
        """

        def mean(values: np.ndarray) -> float:
            return float(values.mean()) if values.size else float("nan")

        absolute = np.abs(self.excess)
        return {
            "step": mean(absolute),
            "step_p95": float(np.percentile(absolute, 95)) if absolute.size else float("nan"),
            "step_signed": mean(self.excess),
            "step_smooth": mean(absolute[self.smooth]),
            "step_textured": mean(absolute[~self.smooth]),
        }


class Contour:
    """The mask's contour in one true picture, against which any number of pictures are measured."""

    def __init__(self, truth: np.ndarray, mask: np.ndarray) -> None:
        """Cuts the contour into pieces.

        Args:
            truth: (h, w, 3) uint8, what ought to be seen: the original, or what was put under the mask with it around.
            mask: (h, w, 1), 1 = generate, 0 = preserve; its contour is where it crosses 0.5.
        """
        inside = generated(mask)[..., 0]
        self._rings = rings(inside, RING)
        self._cell = cells(inside, CELL)
        lab = rgb2lab(truth)
        counts = [ring_means(lab, ring, self._cell)[1] for ring in self._rings]
        self._enough = np.all([count >= LEAST for count in counts], axis=0)
        both = np.logical_or(*self._rings)
        moments = self._means(np.stack([lab[..., 0], lab[..., 0] ** 2], -1), both)
        self._smooth = moments[:, 1] - moments[:, 0] ** 2 < SMOOTH**2
        self._own = self._differences(lab)

    def steps(self, image: np.ndarray) -> Steps:
        """The excess step of every piece in (h, w, 3) uint8."""
        return Steps(self._differences(rgb2lab(image)) - self._own, self._smooth)

    def _differences(self, lab: np.ndarray) -> np.ndarray:
        return np.asarray(deltaE_ciede2000(*(self._means(lab, ring) for ring in self._rings)))

    def _means(self, values: np.ndarray, ring: np.ndarray) -> np.ndarray:
        """Means over each piece's pixels of `ring`: (h, w, c) -> (n, c)."""
        return ring_means(values, ring, self._cell)[0][self._enough]


def join(steps: list[Steps]) -> Steps:
    """The pieces of several pictures."""
    return Steps(*(np.concatenate(values) for values in zip(*steps, strict=True)))
