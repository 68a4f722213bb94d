"""What a benchmark of seams decodes: whole pictures, masks of three kinds, and what an editor may have put under them.

Everything is a function of the seed, the picture's number and the kind of mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.config import MASK_PRESETS, MaskConfig
from asymvq_jax.data.masks import random_mask
from asymvq_jax.evaluation.pictures import Picture
from asymvq_jax.files.masks import generated
from asymvq_jax.inference.edges import distance

MASKS = ("painted", "strokes", "thin")
# The mask that came with a picture.
GIVEN = "given"
# The last is a stress case: whoever paints a mask leaves some of the background inside it.
PROTOCOLS = ("own", "shifted", "inserted inside", "inserted inside, shifted", "inserted flush")
NATURAL = PROTOCOLS[:4]
# Colour difference (CIEDE2000) by which a shift moves what is under the mask.
SHIFT = (2.0, 12.0)
# How far inside the mask an insertion ends, px at 256 px a side, and at most this share of the mask's half width.
MARGIN, MARGIN_SHARE = 8.0, 0.4
# A mask covers so much of the picture, at least and at most.
COVER = (0.01, 0.6)


@dataclass(frozen=True)
class Case:
    """One thing to decode and to judge.

    Attributes:
        picture: its name.
        protocol: of `PROTOCOLS`.
        kind: of mask.
        original: (h, w, 3) uint8, what the editor has; what it holds under the mask must play no part.
        mask: (h, w, 1) float32, 1 = generate, 0 = preserve.
        encoded: (h, w, 3) uint8, of which the latent is.
        truth: (h, w, 3) uint8, what ought to be seen; outside the mask it is the original.
    """

    picture: str
    protocol: str
    kind: str
    original: np.ndarray
    mask: np.ndarray
    encoded: np.ndarray
    truth: np.ndarray


def cases(pictures: Sequence[Picture], seed: int) -> Iterator[Case]:
    """Every protocol with every kind of mask for every picture, which takes insertions from the one after it."""
    for number, picture in enumerate(pictures):
        donor = donor_for(pictures, number)
        for kind in MASKS if picture.mask is None else (GIVEN,):
            rng = partial(np.random.default_rng, (seed, number, (*MASKS, GIVEN).index(kind)))
            mask = picture.mask if picture.mask is not None else draw_mask(kind, rng(), picture.image.shape[:2])
            region = generated(mask)[..., 0]
            inside = insert(picture.image, donor, inset(region))
            whole = insert(picture.image, donor, region)

            for protocol, truth, shifted in (
                ("own", picture.image, False),
                ("shifted", picture.image, True),
                ("inserted inside", inside, False),
                ("inserted inside, shifted", inside, True),
                ("inserted flush", whole, False),
            ):
                encoded = shift(truth, region, rng()) if shifted else truth
                yield Case(picture.name, protocol, kind, picture.image, mask, encoded, truth)


def count_cases(pictures: Sequence[Picture]) -> int:
    """How many cases `cases` yields."""
    return len(PROTOCOLS) * sum(len(MASKS) if picture.mask is None else 1 for picture in pictures)


def donor_for(pictures: Sequence[Picture], number: int) -> np.ndarray:
    """The picture after this one, at this one's size; the only one stands on its head."""
    image = pictures[number].image
    other = pictures[(number + 1) % len(pictures)].image if len(pictures) > 1 else image[::-1]
    if other.shape == image.shape:
        return other
    return np.asarray(cv2.resize(other, image.shape[1::-1], interpolation=cv2.INTER_AREA))


def insert(image: np.ndarray, donor: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The donor where the region is, (h, w) bool, the image elsewhere."""
    return np.where(region[..., None], donor, image)


def inset(region: np.ndarray) -> np.ndarray:
    """The part of a region that is well inside it: (h, w) bool."""
    depth = distance(region)
    deepest = float(depth[np.isfinite(depth)].max(initial=0))
    margin = min(MARGIN * min(region.shape) / 256, MARGIN_SHARE * deepest)
    return np.asarray(depth > margin)


def draw_mask(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A mask of one of `MASKS`: what people paint, LaMa's thick strokes and boxes, or LaMa's thin strokes.

    Args:
        kind: of mask.
        rng: the source of randomness.
        size: height and width.

    Returns:
        (h, w, 1) float32, 0 or 1; the whole picture where none of a hundred covers a share within `COVER`.
    """
    for _ in range(100):
        mask = _painted(rng, size) if kind == "painted" else _lama(kind, rng, size)
        if COVER[0] <= mask.mean() <= COVER[1]:
            return mask
    return np.ones((*size, 1), np.float32)


def _painted(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """An ellipse or a polygon with round corners around an object, seldom two of them."""
    mask = np.zeros(size, np.uint8)
    side = min(size)
    for _ in range(rng.choice([1, 2], p=[0.75, 0.25])):
        middle = [float(rng.uniform(0.2, 0.8) * length) for length in size[::-1]]
        radii = rng.uniform(0.1, 0.32, 2) * side
        if rng.random() < 0.5:
            axes = [max(1, round(r)) for r in radii]
            cv2.ellipse(mask, [round(m) for m in middle], axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
            continue
        corners = int(rng.integers(4, 10))
        angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
        reach = rng.uniform(0.6, 1.0, corners)[:, None] * radii
        points = np.array(middle) + reach * np.stack([np.cos(angles), np.sin(angles)], -1)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
    brush = max(1, round(side / 40))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * brush + 1, 2 * brush + 1))
    return np.asarray(cv2.dilate(mask, disc), np.float32)[..., None]


def _lama(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    preset = MASK_PRESETS["thin_256" if kind == "thin" else "thick_256"]
    # The square of the longer side, of which the middle is taken.
    square = random_mask(rng, max(size), MaskConfig(**{**preset, "full_probability": 0.0}))
    top, left = ((max(size) - length) // 2 for length in size)
    return square[top : top + size[0], left : left + size[1]].astype(np.float32)


def shift(image: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What is under the mask with another tone, as a diffusion model's fill has: `SHIFT` away on average.

    An offset, a gain and a slope across the region, each for every channel, scaled together to the colour difference
    that is drawn; one in four is blurred, and one in four has grain added.

    Args:
        image: (h, w, 3) uint8.
        region: (h, w) bool.
        rng: the source of randomness.

    Returns:
        (h, w, 3) uint8, the image's outside the region.
    """
    wanted = rng.uniform(*SHIFT)
    offset = rng.normal(size=(1, 3)) * 0.5 + rng.normal(size=(1, 1))
    gain = rng.normal(size=(1, 3)) * 0.3 + rng.normal() * 0.3
    slope = rng.normal(size=(2, 3)) * 0.3 + rng.normal(size=(2, 1)) * 0.3
    texture, amount = rng.random(), rng.random()
    noise = rng.normal(size=image.shape)
    if not region.any():
        return image.copy()
    places = np.argwhere(region)
    middle, half = places.mean(0), np.maximum(np.ptp(places, axis=0) / 2, 1)
    pixels = image[region].astype(np.float64)
    change = offset + gain * (pixels - pixels.mean(0)) / 64 + (places - middle) / half @ slope
    before = rgb2lab(pixels / 255)
    least, most = 0.0, 256.0
    for _ in range(12):
        strength = (least + most) / 2
        after = rgb2lab(np.clip(pixels + strength * change, 0, 255) / 255)
        least, most = (strength, most) if deltaE_ciede2000(before, after).mean() < wanted else (least, strength)
    moved: np.ndarray = image.astype(np.float32)
    moved[region] = np.clip(pixels + strength * change, 0, 255)
    if texture < 0.25:
        moved = cv2.GaussianBlur(moved, (0, 0), 0.5 + amount)
    elif texture < 0.5:
        moved = moved + (2 + 4 * amount) * noise
    return np.where(region[..., None], np.clip(moved, 0, 255).round().astype(np.uint8), image)
