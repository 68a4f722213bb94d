"""The geometry of a mask's edge: thin rings on either side of it, and the cells of a grid that cut it into pieces."""

from __future__ import annotations

import cv2
import numpy as np


def distance(region: np.ndarray) -> np.ndarray:
    """How far each pixel of a region is from the nearest one outside it, px: (h, w) bool -> (h, w) float32, 0 outside.

    A region without an outside is infinitely far from it.
    """
    if region.all():
        return np.full(region.shape, np.inf, np.float32)
    return np.asarray(cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))


def rings(inside: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """The pixels within `width` px of the edge, inside it and outside: (h, w) bool each; empty without an edge."""
    inner, outer = (side & (distance(side) <= width) for side in (inside, ~inside))
    return inner, outer


def cells(inside: np.ndarray, side: int) -> np.ndarray:
    """For each pixel, the number of the cell of `side` px in which the nearest point of the edge lies: (h, w) int."""
    rows, columns = (np.arange(length) // side for length in inside.shape)
    cell: np.ndarray = rows[:, None] * (columns[-1] + 1) + columns
    contour = inside & (cv2.dilate((~inside).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    if not contour.any():
        return cell
    _, label = cv2.distanceTransformWithLabels(
        (~contour).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    of_label = np.zeros(label.max() + 1, cell.dtype)
    of_label[label[contour]] = cell[contour]
    return np.asarray(of_label[label])


def ring_means(values: np.ndarray, ring: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over each cell's pixels of a ring.

    Args:
        values: (h, w, c).
        ring: (h, w) bool.
        cell: from `cells`, with n cells.

    Returns:
        (n, c) means, 0 for a cell without pixels, and (n,) how many pixels each has.
    """
    count = int(cell.max()) + 1
    chosen = cell[ring]
    pixels = np.bincount(chosen, minlength=count)
    sums = np.stack([np.bincount(chosen, plane, count) for plane in np.moveaxis(values, -1, 0)[:, ring]], -1)
    return np.asarray(sums / np.maximum(pixels, 1)[:, None]), pixels
