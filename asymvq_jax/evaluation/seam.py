"""Does the mask's edge show, and does the fill still have the colours that it was given?

Pasting the original over any decode wins every metric of the preserved pixels and leaves a tone step; pulling the
fill's colours towards its surroundings closes the step and spoils what was meant to be there. So every way of setting
a fill into a picture is judged by both, on the same latents. No way reads the original under the mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from skimage.color import lab2rgb, rgb2lab
from tqdm import tqdm

from asymvq_jax import inference
from asymvq_jax.errors import EvaluationError
from asymvq_jax.evaluation.metrics.fill import fill_tone, grain
from asymvq_jax.evaluation.metrics.image import boundary_error, psnr
from asymvq_jax.evaluation.metrics.seam import Contour
from asymvq_jax.evaluation.protocols import Case
from asymvq_jax.evaluation.rows import PLAIN, PLAIN_OURS, check_same_encoder, decode_ours, decode_plain, lpips_input
from asymvq_jax.files import images
from asymvq_jax.files.masks import generated
from asymvq_jax.inference.blend import composite
from asymvq_jax.inference.edges import rings
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import jitted

# Widths of the feathered pastes, px.
FEATHERS = (2, 4, 8)
# Width of the rings whose statistics the colour-matched paste takes, px, and by how much it may change a contrast.
RING, CONTRAST = 8, (0.5, 2.0)
# Names of what is measured -> titles of the columns, and the factors they are shown times.
COLUMNS = {
    "psnr_preserved": ("PSNR kept, dB", 1.0),
    "step": ("step, abs.", 1.0),
    "step_signed": ("signed", 1.0),
    "step_smooth": ("smooth", 1.0),
    "step_textured": ("textured", 1.0),
    "gradient": ("gradient error x 1e-3", 1e3),
    "tone": ("fill tone", 1.0),
    "psnr_masked": ("fill, dB", 1.0),
    "grain": ("grain, abs.", 1.0),
    "grain_signed": ("signed", 1.0),
    "lpips": ("LPIPS", 1.0),
}


Decoder = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], np.ndarray]


@dataclass(frozen=True)
class Models:
    """What decodes: ours, the plain autoencoder (None: ours without condition), and one trained to harmonise."""

    ours: Autoencoder
    plain: Autoencoder | None = None
    harmonised: Autoencoder | None = None

    def check(self) -> None:
        """Raises InputError or EvaluationError unless all encode alike and can take a condition where they need one."""
        inference.check_condition(self.ours.config)
        if self.plain is not None:
            check_same_encoder(self.ours, self.plain)
        if self.harmonised is not None:
            inference.check_condition(self.harmonised.config, "--harmonised")
            check_same_encoder(self.ours, self.harmonised, "--harmonised")

    def decoders(self) -> dict[str, Decoder]:
        """By the rows' names, the plain one first, functions of the condition, its mask and a latent.

        And of whether only the masked pixels of what they return are used; see `decode_ours`.
        """
        plain = self.plain or self.ours
        result: dict[str, Decoder] = {
            PLAIN if self.plain is not None else PLAIN_OURS: lambda image, mask, z, exact: decode_plain(
                plain, image, z
            ),
            "ours": partial(decode_ours, self.ours),
        }
        if self.harmonised is not None:
            result["harmonised"] = partial(decode_ours, self.harmonised)
        return result

    def encode(self, image: np.ndarray) -> np.ndarray:
        """The latent of a picture, (h, w, 3) uint8, for any of the decoders."""
        return np.asarray(inference.encode(self.ours, images.to_float(image)[None]))


@dataclass(frozen=True)
class Measured:
    """The metrics of `COLUMNS`, by name, of one row in one case."""

    picture: str
    kind: str
    protocol: str
    row: str
    values: dict[str, float]


def measure_seam(
    models: Models,
    cases: Iterable[Case],
    count: int,
    lpips: LPIPS | None = None,
    save: Callable[[list[Measured]], None] = lambda measured: None,
) -> list[Measured]:
    """Decodes every case, sets the fills in, in every way, and compares with the truth.

    Args:
        models: what decodes.
        cases: from `asymvq_jax.evaluation.protocols.cases`.
        count: how many there are, for the progress bar.
        lpips: the perceptual metric; None leaves it out.
        save: takes all that is measured so far, whenever a picture is done, so that an interrupted run leaves it.

    Raises:
        InputError, EvaluationError: the models do not fit the task or each other.
    """
    models.check()
    measured: list[Measured] = []
    decoders = models.decoders()
    for case in tqdm(cases, total=count, unit="case", desc="seam"):
        if measured and measured[-1].picture != case.picture:
            save(measured)
        latent = models.encode(case.encoded)
        decoded = {
            name: Decoded(*(decode(case.original, case.mask, latent, exact) for exact in (False, True)))
            for name, decode in decoders.items()
        }
        rows = compose_rows(decoded, case.original, case.mask)
        for row, values in judge(rows, case.truth, case.mask, lpips):
            measured.append(Measured(case.picture, case.kind, case.protocol, row, values))
    return measured


class Decoded(NamedTuple):
    """What one decoder made, (h, w, 3) uint8: to be seen whole, and of which only the masked pixels are used."""

    whole: np.ndarray
    fill: np.ndarray


def compose_rows(decoded: dict[str, Decoded], original: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Every way of setting the fills into the original.

    Args:
        decoded: by name, the plain decode first.
        original: (h, w, 3) uint8; what it holds under the mask is taken away before anything else.
        mask: (h, w, 1), 0 or 1.

    Returns:
        (h, w, 3) uint8 by the rows' names.
    """
    original = np.where(generated(mask), np.uint8(0), original)
    name, *others = decoded
    plain = decoded[name].whole
    rows = {name: plain, "paste": composite(plain, original, mask, "none")}
    rows |= {f"paste, feathered {w} px": composite(plain, original, mask, "feather", w) for w in FEATHERS}
    rows["multiband"] = composite(plain, original, mask, "multiband")
    rows["colour-matched paste"] = composite(match_colours(plain, original, mask), original, mask, "none")
    rows["tone"] = composite(plain, original, mask, "tone")
    rows["Poisson"] = composite(plain, original, mask, "poisson")
    for other in others:
        rows[other], fill = decoded[other]
        rows[f"{other} + paste"] = composite(fill, original, mask, "none")
        rows[f"{other} + tone"] = composite(fill, original, mask, "tone")
        rows[f"{other} + Poisson"] = composite(fill, original, mask, "poisson")
    return rows


def check_row(models: Models, row: str) -> None:
    """Raises EvaluationError unless `measure_seam` has the row; the message lists what it has."""
    nothing = np.zeros((1, 1, 3), np.uint8)
    rows = compose_rows(
        dict.fromkeys(models.decoders(), Decoded(nothing, nothing)), nothing, np.zeros((1, 1, 1), np.float32)
    )
    if row not in rows:
        raise EvaluationError(f"--against {row!r}: expected one of {', '.join(rows)}")


def match_colours(fill: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The fill with the mean and deviation of each CIE Lab channel matched at the edge (Reinhard et al. 2001).

    Args:
        fill: (h, w, 3) uint8.
        original: (h, w, 3) uint8; only a ring outside the mask is read.
        mask: (h, w, 1).

    Returns:
        (h, w, 3) uint8; the fill where there is no edge.
    """
    inner, outer = rings(generated(mask)[..., 0], RING)
    if not inner.any():
        return fill
    lab, inside, outside = rgb2lab(fill), rgb2lab(fill[inner] / 255), rgb2lab(original[outer] / 255)
    contrast = np.clip(outside.std(0) / np.maximum(inside.std(0), 1e-6), *CONTRAST)
    matched = (lab - inside.mean(0)) * contrast + outside.mean(0)
    with warnings.catch_warnings():
        # Colours that no screen shows are clipped, which is what is to become of them.
        warnings.simplefilter("ignore", UserWarning)
        return np.asarray(np.clip(np.round(lab2rgb(matched) * 255), 0, 255), np.uint8)


def judge(
    rows: dict[str, np.ndarray], truth: np.ndarray, mask: np.ndarray, lpips: LPIPS | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """The metrics of `COLUMNS` for each row, against what ought to be seen."""
    contour, inside = Contour(truth, mask), generated(mask)[..., 0]
    wanted = None if lpips is None else _features(lpips, lpips_input(truth))
    for row, image in rows.items():
        steps, octaves = contour.steps(image).summary(), grain(image, truth, mask)
        values = {
            "psnr_preserved": psnr(image, truth, ~inside) if (~inside).any() else float("nan"),
            **{name: steps[name] for name in ("step", "step_signed", "step_smooth", "step_textured")},
            "gradient": boundary_error(image, truth, mask),
            "tone": fill_tone(image, truth, mask),
            "psnr_masked": psnr(image, truth, inside) if inside.any() else float("nan"),
            "grain": abs(octaves),
            "grain_signed": octaves,
        }
        if lpips is not None and wanted is not None:
            values["lpips"] = float(_distance(lpips, _features(lpips, lpips_input(image)), wanted)[0])
        yield row, values


@jitted
def _features(lpips: LPIPS, image: jax.Array) -> list[jax.Array]:
    return lpips.features(image)


@jitted
def _distance(lpips: LPIPS, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    return lpips.distance(a, b)
