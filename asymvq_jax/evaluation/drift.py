"""Repeated edits: what becomes of a picture that is encoded and decoded over and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from asymvq_jax.evaluation.metrics.image import psnr
from asymvq_jax.evaluation.metrics.seam import Contour
from asymvq_jax.evaluation.pictures import Picture
from asymvq_jax.evaluation.protocols import donor_for, draw_mask, insert, inset
from asymvq_jax.evaluation.rows import markdown
from asymvq_jax.evaluation.seam import Decoder, Models
from asymvq_jax.evaluation.seam_report import mean
from asymvq_jax.files.masks import generated
from asymvq_jax.inference.blend import MIXING, Blend, composite

# So many pictures are enough: passes and edits decode each a hundred times and more.
PICTURES = 3
PASSES = 10
SHOWN_PASSES = (1, 2, 5, 10)
EDITS = 25
SHOWN_EDITS = (1, 5, 10, 25)

DRIFT_COLUMNS = {
    "psnr_preserved": "PSNR kept, dB",
    "lightness": "lightness, change of L*",
    "sharpness": "sharpness, share left",
    "step": "step, abs.",
}
EDIT_COLUMNS = {"psnr_preserved": "PSNR kept, dB", "psnr_fills": "PSNR of earlier fills, dB"}
Passes = dict[str, list[dict[str, float]]]


def measure_drift(models: Models, pictures: Sequence[Picture], seed: int) -> Passes:
    """One mask over and over: every pass encodes and decodes the picture that the pass before it left.

    Args:
        models: what decodes.
        pictures: whole pictures; those without a mask get a painted one.
        seed: of the masks.

    Returns:
        By row, for each of `PASSES` passes, the metrics of `DRIFT_COLUMNS` against the first original: the change of
        the mean lightness (0 to 100) and the share of the mean gradient that is left, both over the preserved pixels.
    """
    # How to decode, and whether to paste the original over it.
    ways = {
        ("paste" if pasted and not number else f"{name} + paste" if pasted else name): (decode, pasted)
        for number, (name, decode) in enumerate(models.decoders().items())
        for pasted in (False, True)
    }
    seen: dict[str, list[list[dict[str, float]]]] = {way: [[] for _ in range(PASSES)] for way in ways}
    for number, picture in enumerate(tqdm(pictures, unit="picture", desc="drift")):
        original, mask = picture.image, picture.mask
        if mask is None:
            mask = draw_mask("painted", np.random.default_rng((seed, number)), original.shape[:2])
        contour = Contour(original, mask)
        for way, (decode, pasted) in ways.items():
            image = original
            for step in range(PASSES):
                image = decode(image, mask, models.encode(image), pasted)
                image = composite(image, original, mask, "none") if pasted else image
                seen[way][step].append(
                    {**drifted(image, original, mask), "step": contour.steps(image).summary()["step"]}
                )
    return _means(seen, DRIFT_COLUMNS)


def _means(seen: dict[str, list[list[dict[str, float]]]], columns: dict[str, str]) -> Passes:
    """Over the pictures, by row and by step."""
    return {
        way: [{name: mean(np.array([m[name] for m in measured])) for name in columns} for measured in steps]
        for way, steps in seen.items()
    }


def drifted(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How the preserved pixels of a picture differ from the original's in PSNR, in lightness and in sharpness.

    Args:
        image: (h, w, 3) uint8.
        original: (h, w, 3) uint8.
        mask: (h, w, 1), 1 = generate, 0 = preserve.

    Returns:
        psnr_preserved; lightness, positive where the image is lighter; sharpness, below 1 where it is blurred. NaN
        where nothing is preserved.
    """
    kept = ~generated(mask)[..., 0]
    lightness, first = (cv2.cvtColor(x.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0] for x in (image, original))
    # Only where the neighbours are preserved as well.
    within = cv2.erode(kept.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    now, before = (np.hypot(*np.gradient(x))[within] for x in (lightness, first))
    return {
        "psnr_preserved": psnr(image, original, kept) if kept.any() else float("nan"),
        "lightness": float((lightness - first)[kept].mean()) if kept.any() else float("nan"),
        "sharpness": float(now.mean() / before.mean()) if before.any() else float("nan"),
    }


def measure_edits(models: Models, pictures: Sequence[Picture], count: int, seed: int) -> Passes:
    """Many edits: each inserts a part of the next picture, under a mask of its own, into what the one before left.

    Args:
        models: what decodes.
        pictures: whole pictures, the first `count` of which are edited.
        count: how many.
        seed: of the masks.

    Returns:
        By row, after each of `EDITS` edits: the PSNR of the pixels that no mask has covered yet against the first
        original, and of the fills, where no later mask covers them, against what they were at first.
    """
    ways = dict(_ways(models))
    seen: dict[str, list[list[dict[str, float]]]] = {way: [[] for _ in range(EDITS)] for way in ways}
    chosen = pictures[:count]
    with tqdm(total=len(chosen) * len(ways), unit="run", desc="edits") as bar:
        for number, picture in enumerate(chosen):
            size = picture.image.shape[:2]
            masks = [_small_mask(np.random.default_rng((seed, number, edit)), size) for edit in range(EDITS)]
            for way, edit in ways.items():
                for step, numbers in enumerate(_edited(picture.image, donor_for(pictures, number), masks, edit)):
                    seen[way][step].append(numbers)
                bar.update()
    return _means(seen, EDIT_COLUMNS)


def _small_mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A painted mask of half the size somewhere in the picture, so that many of them leave some of it untouched."""
    mask = np.zeros((*size, 1), np.float32)
    half = tuple(max(1, length // 2) for length in size)
    top, left = (int(rng.integers(0, length - part, endpoint=True)) for length, part in zip(size, half, strict=True))
    mask[top : top + half[0], left : left + half[1]] = draw_mask("painted", rng, (half[0], half[1]))
    return mask


Edit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _ways(models: Models) -> Iterator[tuple[str, Edit]]:
    """By row, a function of what is there, the mask, and what is to be there, which gives the edited picture."""

    def edit(
        decode: Decoder, blend: Blend | None, image: np.ndarray, mask: np.ndarray, wanted: np.ndarray
    ) -> np.ndarray:
        decoded = decode(image, mask, models.encode(wanted), blend is not None and blend not in MIXING)
        return decoded if blend is None else composite(decoded, image, mask, blend)

    for number, (name, decode) in enumerate(models.decoders().items()):
        yield name, partial(edit, decode, None)
        yield f"{name} + paste" if number else "paste", partial(edit, decode, "none")
        if not number:
            yield "paste, feathered 8 px", partial(edit, decode, "feather")
            yield "multiband", partial(edit, decode, "multiband")


def _edited(
    image: np.ndarray, donor: np.ndarray, masks: Sequence[np.ndarray], edit: Edit
) -> Iterator[dict[str, float]]:
    """What is left after each edit of one picture."""
    now, untouched = image, np.ones(image.shape[:2], bool)
    # At each pixel, the first version of the latest fill.
    first = image.copy()
    for mask in masks:
        region = generated(mask)[..., 0]
        earlier = ~untouched & ~region
        now = edit(now, mask, insert(now, donor, inset(region)))
        untouched &= ~region
        yield {
            "psnr_preserved": psnr(now, image, untouched) if untouched.any() else float("nan"),
            "psnr_fills": psnr(now, first, earlier) if earlier.any() else float("nan"),
        }
        first[region] = now[region]


def drift_table(rows: Passes) -> str:
    """Some of the passes of every row as Markdown."""
    return _table(rows, DRIFT_COLUMNS, "pass", SHOWN_PASSES)


def edits_table(rows: Passes) -> str:
    """The state after some of the edits, of every row, as Markdown."""
    return _table(rows, EDIT_COLUMNS, "edit", SHOWN_EDITS)


def _table(rows: Passes, columns: dict[str, str], what: str, shown: Sequence[int]) -> str:
    cells = [
        [f"{row}, {what} {number}", *(f"{passes[number - 1][name]:.4g}" for name in columns)]
        for row, passes in rows.items()
        for number in shown
    ]
    return markdown(["", *columns.values()], cells)
