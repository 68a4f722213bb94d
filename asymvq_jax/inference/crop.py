"""Crop and stitch: the surroundings of a mask are cut out of a picture, filled at another size, and set back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from asymvq_jax.errors import InputError
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.masks import HAZE, reduce_mask
from asymvq_jax.files.pictures import Picture

WORK_SIZE = 512


@dataclass(frozen=True)
class Crop:
    """How much of a picture is filled, and at which size.

    Attributes:
        context: the region's side as a multiple of the longer side of the mask's box, 1 or more.
        work_size: the longer side, px, to which the region is scaled for the model; a multiple of its downsampling.
    """

    context: float = 1.5
    work_size: int = WORK_SIZE

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        if not 1 <= self.context <= 100:
            raise InputError(f"context {self.context:g}: expected 1 to 100, as a multiple of the mask's box")
        if not 1 <= self.work_size <= 2**14:
            raise InputError(f"work size {self.work_size}: expected 1 to {2**14} px")

    def region(self, mask: Array, factor: int) -> Region:
        """The region of a picture that is worked on.

        It is a square about the mask's box, moved to lie inside the picture and, where that is smaller, cut to it. Of
        a mask that generates nothing it is the whole picture.

        Args:
            mask: (h, w, 1), 1 = generate.
            factor: the model's downsampling, of which both working sides are multiples.

        Raises:
            InputError: the working size is not a multiple of the factor.
        """
        if self.work_size % factor:
            raise InputError(f"work size {self.work_size}: expected a multiple of {factor}, the model's downsampling")
        masked = mask[..., 0] > HAZE
        rows, columns = (_span(np.asarray(masked.any(axis))) for axis in (1, 0))
        longest = max(rows[1] - rows[0], columns[1] - columns[0])
        # At least what the latent's samples beside the mask reach.
        side = max(round(self.context * longest), longest + 2 * factor)
        top, height = _around(*rows, side, masked.shape[0])
        left, width = _around(*columns, side, masked.shape[1])
        work = [max(factor, round(n * self.work_size / max(height, width) / factor) * factor) for n in (height, width)]
        return Region(top, left, height, width, (work[0], work[1]))


def _span(masked: Array) -> tuple[int, int]:
    """Where the masked part of a line begins and ends; all of it where nothing is masked."""
    places = np.flatnonzero(masked)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, len(masked))


def _around(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    """Start and length of what of 0 to `limit` is `side` long and has low to high in its middle, as far as it can."""
    side = min(side, limit)
    return min(max((low + high - side) // 2, 0), limit - side), side


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, px, and the height and width at which the model sees it."""

    top: int
    left: int
    height: int
    width: int
    work: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in the picture, px."""
        return self.height, self.width

    def describe(self) -> str:
        """Such as "region of 640 x 640 px at 120, 80, filled at 512 x 512 px" (width and left first)."""
        height, width = self.work
        return f"region of {self.width} x {self.height} px at {self.left}, {self.top}, filled at {width} x {height} px"

    def of(self, array: Array) -> Array:
        """The region of (h, w, c), a view."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def cut(self, picture: Picture) -> Picture:
        """The region as a picture of its own."""
        return replace(
            picture, colour=self.of(picture.colour), alpha=None if picture.alpha is None else self.of(picture.alpha)
        )

    def enter(self, picture: Picture) -> Picture:
        """The region of a picture at the working size."""
        return scaled(self.cut(picture), self.work)

    def enter_mask(self, mask: Array) -> Array:
        """The region of (h, w, 1) at the working size, where any masked pixel counts."""
        return reduce_mask(self.of(mask), self.work)

    def leave(self, decoded: Array) -> Array:
        """What was made at the working size, (*work, c) float32, at the picture's own."""
        return resize(decoded, self.size)

    def stitch(self, part: Picture, whole: Picture) -> Picture:
        """The whole picture with the region replaced; all other pixels are its own, bit for bit."""
        colour, alpha = whole.colour.copy(), None if whole.alpha is None else whole.alpha.copy()
        self.of(colour)[...] = part.colour
        if alpha is not None and part.alpha is not None:
            self.of(alpha)[...] = part.alpha
        return replace(whole, colour=colour, alpha=alpha)


def scaled(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture at another height and width."""
    if picture.size == size:
        return picture
    alpha = picture.alpha
    return replace(picture, colour=resize(picture.colour, size), alpha=None if alpha is None else resize(alpha, size))


def resize(pixels: Array, size: tuple[int, int]) -> Array:
    """(h, w, c) at another height and width: by area where it shrinks, else cubic."""
    if pixels.shape[:2] == size:
        return pixels
    shrinks = size[0] * size[1] < pixels.shape[0] * pixels.shape[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=way)).reshape(*size, pixels.shape[2])
