"""What a sceptic asks of a decoder that preserves pixels: does the mask's edge show, and do repeated edits drift?

Pasting the original over any decode wins every metric of the preserved pixels and leaves a tone step, so every row
here is judged by both: the excess step along the contour and the PSNR of the preserved pixels.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from asymvq_jax import inference
from asymvq_jax.evaluation.metrics.image import boundary_error, decibels, mean_squared_error, psnr
from asymvq_jax.evaluation.metrics.seam import Contour, Steps, join
from asymvq_jax.evaluation.pairs import Pair
from asymvq_jax.evaluation.rows import PLAIN, compose, decode_ours, decode_plain, hard_paste, markdown
from asymvq_jax.files import images
from asymvq_jax.files.outputs import write_bytes
from asymvq_jax.models.autoencoder import Autoencoder

# Radii (standard deviations) of the blurred pastes, px.
BLURS = (2, 4, 8)
# What the shifted latent is under the mask: a gain, and an offset in standard deviations of the picture's latent. A
# diffusion model's latents differ from the encoder's in tone by about so little.
GAIN, OFFSET = 1.05, 0.1
LATENTS = ("own latent", "shifted latent")
PASSES = 10
SHOWN_PASSES = (1, 2, 5, 10)

Rows = dict[str, dict[str, float]]
SEAM_COLUMNS = {
    "psnr_preserved": "PSNR kept, dB",
    "seam": "excess step, mean",
    "seam_p95": "95th percentile",
    "seam_smooth": "smooth contours",
    "seam_textured": "textured",
    "boundary_error": "gradient error x 1e-3",
}
DRIFT_COLUMNS = {
    "psnr_preserved": "PSNR kept, dB",
    "lightness": "lightness, change of L*",
    "sharpness": "sharpness, share left",
    "seam": "excess step, mean",
}


def measure_seam(model: Autoencoder, plain: Autoencoder, pairs: Iterable[Pair], count: int) -> dict[str, Rows]:
    """Every way of keeping pixels, with the latent as it was encoded and shifted under the mask.

    Args:
        model: the autoencoder with a condition branch.
        plain: the one whose decoder came with the encoder.
        pairs: pictures and masks.
        count: how many there are, for the progress bar.

    Returns:
        By latent (`LATENTS`), by row, the metrics of `SEAM_COLUMNS`, over all pictures.
    """
    judges = {latent: defaultdict(_Judge) for latent in LATENTS}
    for pair in tqdm(pairs, total=count, unit="picture", desc="seam"):
        contour = Contour(pair.image, pair.mask)
        own = np.asarray(inference.encode(model, images.to_float(pair.image)[None]))
        for name, z in zip(LATENTS, (own, _shifted(own, pair.mask, model.config.downsampling)), strict=True):
            for row, image in _composed(model, plain, pair, z).items():
                judges[name][row].see(image, pair, contour)
    return {name: {row: judge.summary() for row, judge in rows.items()} for name, rows in judges.items()}


class _Judge:
    """Gathers the metrics of one row over pictures."""

    def __init__(self) -> None:
        self.steps: list[Steps] = []
        self.errors: list[float] = []
        self.gradients: list[float] = []

    def see(self, image: np.ndarray, pair: Pair, contour: Contour) -> None:
        self.steps.append(contour.steps(image))
        self.errors.append(mean_squared_error(image, pair.image, pair.mask[..., 0] <= 0.5))
        self.gradients.append(1e3 * boundary_error(image, pair.image, pair.mask))

    def summary(self) -> dict[str, float]:
        return {
            "psnr_preserved": decibels(float(np.nanmean(self.errors))),
            **join(self.steps).summary(),
            "boundary_error": float(np.nanmean(self.gradients)),
        }


def _shifted(latent: np.ndarray, mask: np.ndarray, downsampling: int) -> np.ndarray:
    """The latent with a gain and an offset wherever the mask covers any of a latent pixel's."""
    covered = np.asarray(inference.pad(mask[None], downsampling))
    _, height, width, _ = latent.shape
    covered = covered.reshape(1, height, downsampling, width, downsampling, 1).max((2, 4)) > 0.5
    return np.where(covered, latent * GAIN + OFFSET * latent.std(), latent).astype(np.float32)


def _composed(model: Autoencoder, plain: Autoencoder, pair: Pair, latent: np.ndarray) -> dict[str, np.ndarray]:
    """The evaluation's rows, the blurred pastes among them."""
    rows = compose(model, plain, pair, latent)
    pastes = {f"paste, blurred {r} px": blurred_paste(rows[PLAIN], pair.image, pair.mask, r) for r in BLURS}
    return {name: rows[name] for name in (PLAIN, "paste")} | pastes | rows


def blurred_paste(image: np.ndarray, original: np.ndarray, mask: np.ndarray, radius: float) -> np.ndarray:
    """The original mixed with `image` by the mask after a Gaussian blur of `radius` px."""
    share = cv2.GaussianBlur((mask[..., 0] > 0.5).astype(np.float32), (0, 0), radius)[..., None]
    return np.round(image * share + original * (1 - share)).astype(np.uint8)


def measure_drift(model: Autoencoder, plain: Autoencoder, pairs: Iterable[Pair], count: int) -> dict[str, list[dict]]:
    """Each way over and over: every pass encodes and decodes the picture that the pass before it left.

    Args:
        model, plain, pairs, count: see `measure_seam`.

    Returns:
        By row, for each of `PASSES` passes, the metrics of `DRIFT_COLUMNS` against the first original: the change of
        the mean lightness (0 to 100) and the share of the mean gradient that is left, both over the preserved pixels.
    """

    def plainly(image: np.ndarray, mask: np.ndarray, latent: np.ndarray) -> np.ndarray:
        return decode_plain(plain, image, latent)

    ours = partial(decode_ours, model)
    # How to decode, and whether to paste the original over it.
    ways = {PLAIN: (plainly, False), "paste": (plainly, True), "ours": (ours, False), "ours + paste": (ours, True)}
    seen: dict[str, list[list[dict[str, float]]]] = {way: [[] for _ in range(PASSES)] for way in ways}
    for pair in tqdm(pairs, total=count, unit="picture", desc="drift"):
        contour = Contour(pair.image, pair.mask)
        for way, (decode, pasted) in ways.items():
            image = pair.image
            for step in range(PASSES):
                latent = np.asarray(inference.encode(model, images.to_float(image)[None]))
                image = decode(image, pair.mask, latent)
                image = hard_paste(image, pair.image, pair.mask) if pasted else image
                seen[way][step].append(_drifted(image, pair, contour))
    return {
        way: [{name: float(np.nanmean([m[name] for m in measured])) for name in DRIFT_COLUMNS} for measured in passes]
        for way, passes in seen.items()
    }


def _drifted(image: np.ndarray, pair: Pair, contour: Contour) -> dict[str, float]:
    kept = pair.mask[..., 0] <= 0.5
    lab = [cv2.cvtColor(x.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0] for x in (image, pair.image)]
    # Only where the neighbours are preserved as well.
    within = cv2.erode(kept.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    gradients = [np.hypot(*np.gradient(x))[within].mean() for x in lab]
    return {
        "psnr_preserved": psnr(image, pair.image, kept),
        "lightness": float((lab[0] - lab[1])[kept].mean()),
        "sharpness": float(gradients[0] / gradients[1]),
        "seam": contour.steps(image).summary()["seam"],
    }


def seam_table(rows: Rows) -> str:
    """One latent's rows as Markdown."""
    cells = [[row, *(f"{values[name]:.4g}" for name in SEAM_COLUMNS)] for row, values in rows.items()]
    return markdown(["", *SEAM_COLUMNS.values()], cells)


def drift_table(rows: dict[str, list[dict]]) -> str:
    """Some of the passes of every row as Markdown."""
    cells = [
        [f"{row}, pass {number}", *(f"{passes[number - 1][name]:.4g}" for name in DRIFT_COLUMNS)]
        for row, passes in rows.items()
        for number in SHOWN_PASSES
    ]
    return markdown(["", *DRIFT_COLUMNS.values()], cells)


def plot(path: str, seam: dict[str, Rows]) -> None:
    """Draws the excess step against the PSNR of the preserved pixels, so that no row wins one by losing the other.

    What preserves every pixel exactly has no finite PSNR and stands at the right edge.
    """
    # Here, because only this needs it; without pyplot, which keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels: Sequence = figure.subplots(1, len(seam), sharey=True)
    for panel, (latent, rows) in zip(panels, seam.items(), strict=True):
        finite = [r["psnr_preserved"] for r in rows.values() if np.isfinite(r["psnr_preserved"])]
        edge = max(finite) + 5
        for row, values in rows.items():
            x = min(values["psnr_preserved"], edge)
            panel.plot(x, values["seam"], "o", color="tab:red" if row.startswith("ours") else "tab:gray")
            panel.annotate(row, (x, values["seam"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        panel.axvline(edge, linestyle=":", color="tab:gray", linewidth=0.8)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=latent, xlabel="PSNR of the preserved pixels, dB (right edge: exact)")
        panel.margins(x=0.15)
    panels[0].set_ylabel("excess boundary step, CIEDE2000")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
