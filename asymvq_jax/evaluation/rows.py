"""Evaluation: our decode beside the plain decode of the same latents, and beside what a sceptic would try first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import jax
import numpy as np
from tqdm import tqdm

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import EvaluationError
from asymvq_jax.evaluation.metrics.distribution import (
    Extractor,
    Statistics,
    frechet_distance,
    inception_score,
    statistics,
)
from asymvq_jax.evaluation.metrics.image import all_metrics
from asymvq_jax.evaluation.pairs import Pair, list_latents, pair_latent, read_latent
from asymvq_jax.files import images
from asymvq_jax.files.masks import generated
from asymvq_jax.inference.blend import composite
from asymvq_jax.inference.packed import without_frames
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import Params, jitted, split

log = logging.getLogger(__name__)

ORIGINAL = "original"
PLAIN = "plain"
PLAIN_OURS = "plain (ours, no condition)"
GRID_ROWS = 8
# What `Results.grid` shows of each picture.
GRID_COLUMNS = 8
# How much the pieces of the mask's edge are enlarged there.
ENLARGED = 4


@dataclass
class Results:
    """Means of every metric for every row, how many pictures each covers, and a picture grid."""

    pictures: int
    rows: dict[str, dict[str, float]]
    counts: dict[str, dict[str, int]]
    columns: list[tuple[str, list[np.ndarray]]] = field(repr=False)

    def grid(self) -> np.ndarray:
        """The first pictures, (h, w, 3) uint8; all are scaled down to the first one's size."""
        height, width, _ = self.columns[0][1][0].shape
        fit = [
            (title, [cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA) for p in pictures])
            for title, pictures in self.columns
        ]
        return images.grid(fit)


def check_same_encoder(model: Autoencoder, other: Autoencoder, option: str = "--plain") -> None:
    """Raises EvaluationError unless both models encode alike, so that their decoders get the same latents.

    Args:
        model: ours.
        other: the model that `option` names.
        option: for the message.
    """
    ours, theirs = split(model)[1], split(other)[1]
    differing = [
        name
        for name in ours
        if not name.startswith("decoder.")
        and (name not in theirs or not np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name])))
    ]
    if differing:
        what = "the plain autoencoder" if option == "--plain" else f"the model of {option}"
        raise EvaluationError(
            f"{what} has another encoder ({len(differing)} parameters differ, such as {differing[0]}), "
            f"so the latents would not be the same; name the one that the decoder was trained with by {option}"
        )


def evaluate(
    model: Autoencoder,
    plain: Autoencoder | None,
    pairs: Iterator[Pair],
    count: int,
    lpips: LPIPS,
    inception: Params | None = None,
) -> Results:
    """Measures every row on every pair, with its edited latent or, without one, the original's own (its mode).

    Args:
        model: the autoencoder with a condition branch.
        plain: the one whose decoder came with the encoder; None: our decoder without condition stands in, and the row
            says so.
        pairs: pictures and masks.
        count: how many there are, for the progress bar.
        lpips: the perceptual metric, on whole pictures.
        inception: the network of FID, which is then measured too: of each row's pictures against the originals.

    Raises:
        InputError, EvaluationError: the models do not fit the task.
    """
    inference.check_condition(model.config)
    if plain is not None:
        check_same_encoder(model, plain)
    values: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    # Made once for each row: each puts the network onto the devices.
    extractors: dict[str, Extractor] = {}
    done = 0
    for pair in tqdm(pairs, total=count, unit="picture", desc="evaluating"):
        latent = pair_latent(model, pair)
        rows = compose(model, plain, pair, latent)
        for row, image in rows.items():
            measured = all_metrics(image, pair.image, pair.mask)
            measured["lpips"] = _lpips(lpips, image, pair.image)
            for name, value in measured.items():
                values.setdefault(row, {}).setdefault(name, []).append(value)
        if inception is not None:
            for row, image in {**rows, ORIGINAL: pair.image}.items():
                if row not in extractors:
                    extractors[row] = Extractor(inception)
                extractors[row].add(image)
        if done < GRID_ROWS:
            for title, picture in _shown(rows, pair).items():
                shown.setdefault(title, []).append(picture)
        done += 1
    means = {r: {n: _mean(v) for n, v in metrics.items()} for r, metrics in values.items()}
    for row, distance in _distances(extractors).items():
        means[row]["fid"] = distance
    return Results(
        pictures=done,
        rows=means,
        counts={r: {n: int(np.sum(~np.isnan(v))) for n, v in metrics.items()} for r, metrics in values.items()},
        columns=list(shown.items()),
    )


def _distances(extractors: dict[str, Extractor]) -> dict[str, float]:
    """FID of every row against the originals."""
    known = {row: statistics(extractor.features().pool) for row, extractor in extractors.items()}
    original = known.pop(ORIGINAL, None)
    if original is None:
        return {}
    return {row: frechet_distance(stats, original) for row, stats in known.items()}


def _mean(values: list[float]) -> float:
    """The mean over the pictures that have the metric; a PSNR is infinite only where all of them are."""
    kept = np.array([v for v in values if not np.isnan(v)])
    finite = kept[np.isfinite(kept)]
    if not kept.size:
        return float("nan")
    return float(finite.mean()) if finite.size else float(kept[0])


def compose(
    model: Autoencoder, plain: Autoencoder | None, pair: Pair, latent: jax.Array | np.ndarray
) -> dict[str, np.ndarray]:
    """The pictures, (h, w, 3) uint8, that every row makes of one latent; arguments as in `evaluate`."""
    plain_image = decode_plain(plain or model, pair.image, latent)
    return {
        PLAIN if plain is not None else PLAIN_OURS: plain_image,
        "paste": hard_paste(plain_image, pair.image, pair.mask),
        "Poisson": composite(plain_image, pair.image, pair.mask, "poisson"),
        "ours": decode_ours(model, pair.image, pair.mask, latent),
        "ours + paste": hard_paste(decode_ours(model, pair.image, pair.mask, latent, True), pair.image, pair.mask),
    }


def decode_plain(plain: Autoencoder, image: np.ndarray, latent: jax.Array | np.ndarray) -> np.ndarray:
    """The decode without a condition, (h, w, 3) uint8, of the size of `image`."""
    return images.to_uint8(inference.decode(plain, latent, size=image.shape[:2])[0])


def decode_ours(
    model: Autoencoder,
    image: np.ndarray,
    mask: np.ndarray,
    latent: jax.Array | np.ndarray,
    exact: bool = False,
) -> np.ndarray:
    """The decode, (h, w, 3) uint8, conditioned on `image` where the mask preserves it.

    With `exact` only its masked pixels are meant to be used, as by `asymvq inpaint --keep exact`.
    """
    margin = inference.margin_of(model.config, inference.Keeping("exact")) if exact else 0
    decoded = inference.decode(model, latent, images.to_float(image)[None], mask[None], margin=margin)
    return images.to_uint8(decoded[0])


def _shown(rows: dict[str, np.ndarray], pair: Pair) -> dict[str, np.ndarray]:
    plain, ours = next(iter(rows.values())), rows["ours"]
    return {
        ORIGINAL: pair.image,
        "masked": np.where(generated(pair.mask), np.uint8(127), pair.image),
        next(iter(rows)): plain,
        "ours": ours,
        "plain, error x 4": images.error_map(plain, pair.image),
        "ours, error x 4": images.error_map(ours, pair.image),
        f"paste, edge x {ENLARGED}": edge_of(rows["paste"], pair.mask),
        f"ours + paste, edge x {ENLARGED}": edge_of(rows["ours + paste"], pair.mask),
    }


def edge_of(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A piece of a picture around the mask's edge, enlarged to the picture's size; the whole without an edge.

    Args:
        image: (h, w, 3) uint8.
        mask: (h, w, 1), 1 = generate.
    """
    inside = generated(mask)[..., 0].astype(np.uint8)
    rows, columns = np.nonzero(inside - cv2.erode(inside, np.ones((3, 3), np.uint8), borderValue=1))
    if not rows.size:
        return image
    h, w = inside.shape
    height, width = max(1, h // ENLARGED), max(1, w // ENLARGED)
    # The edge's pixel that lies nearest to the picture's middle, so that the piece is not of its border.
    i = int(np.argmin((rows - h / 2) ** 2 + (columns - w / 2) ** 2))
    top = int(np.clip(rows[i] - height // 2, 0, h - height))
    left = int(np.clip(columns[i] - width // 2, 0, w - width))
    piece = image[top : top + height, left : left + width]
    return cv2.resize(piece, (w, h), interpolation=cv2.INTER_NEAREST)


def hard_paste(image: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The original where the mask is 0, `image` elsewhere."""
    return np.where(generated(mask), image, original)


def _lpips(lpips: LPIPS, image: np.ndarray, original: np.ndarray) -> float:
    return float(_distance(lpips, lpips_input(image), lpips_input(original))[0])


def lpips_input(image: np.ndarray) -> jax.Array:
    """(h, w, 3) uint8 -> (1, h, w, 3) in [-1, 1], small ones enlarged to the 32 px that LPIPS's networks can halve."""
    if min(image.shape[:2]) < 32:
        scale = 32 / min(image.shape[:2])
        size = tuple(max(32, round(s * scale)) for s in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return images.to_float(image)[None]


@jitted
def _distance(lpips: LPIPS, a: jax.Array, b: jax.Array) -> jax.Array:
    return lpips(a, b)


COLUMNS = {
    "preservation_error": ("preservation error x 1e-5", 1e5),
    "psnr_preserved": ("PSNR kept, dB", 1.0),
    "ssim_preserved": ("SSIM kept", 1.0),
    "psnr_masked": ("PSNR masked, dB", 1.0),
    "ssim_masked": ("SSIM masked", 1.0),
    "lpips": ("LPIPS", 1.0),
    "boundary_error": ("boundary error x 1e-3", 1e3),
    "fid": ("FID", 1.0),
}
# The paper's tables: ImageNet inpainting (FID, LPIPS, preservation error) and MS-COCO text-to-image (FID, Inception
# Score), both with Stable Diffusion 1.5.
PUBLISHED_INPAINTING = {
    "vanilla": (9.57, 0.255, 1082.8e-5),
    "base": (7.60, 0.137, 5.7e-5),
    "x1.5": (7.55, 0.136, 2.6e-5),
    "x2": (7.49, 0.134, 2.1e-5),
}
PUBLISHED_TEXT = {"vanilla": (19.88, 37.55), "x2 without condition": (19.68, 37.73)}


def table(results: Results) -> str:
    """The results as aligned Markdown."""
    columns = {name: column for name, column in COLUMNS.items() if name in results.rows["ours"]}
    rows = [
        [row, *(f"{metrics[name] * scale:.4g}" for name, (_, scale) in columns.items())]
        for row, metrics in results.rows.items()
    ]
    return markdown(["", *(title for title, _ in columns.values())], rows)


def paper_table(results: Results) -> str:
    """The paper's inpainting table as Markdown: its published rows, and the plain and our decoder beside them."""
    first = next(iter(results.rows))
    measured = {f"{row} (measured)": results.rows[row] for row in (first, "ours")}
    rows = {f"{name} (published)": values for name, values in PUBLISHED_INPAINTING.items()}
    rows |= {name: (m["fid"], m["lpips"], m["preservation_error"]) for name, m in measured.items()}
    cells = [[name, f"{fid:.2f}", f"{lpips:.3f}", f"{1e5 * error:.1f}"] for name, (fid, lpips, error) in rows.items()]
    return markdown(["", "FID", "LPIPS", "preservation error x 1e-5"], cells)


def evaluate_text(
    model: Autoencoder,
    plain: Autoencoder | None,
    folder: str,
    reference: Statistics,
    inception: Params,
    *,
    scaled: bool | None = None,
) -> dict[str, tuple[float, float]]:
    """FID against `reference` and Inception Score of what the decoders make of latents alone (text-to-image).

    Args:
        model: our autoencoder, whose decoder runs without picture and mask.
        plain: the one whose decoder came with the encoder; None leaves the row out.
        folder: latents as a diffusion model gives them, (c, h, w) or (h, w, c) times the scaling factor, as .npy files.
        scaled: whether they are; None: as the files say, or else they are.
        reference: of the real pictures.
        inception: the network of the scores.

    Raises:
        EvaluationError: the folder is missing or holds no latents.
    """
    paths = list_latents(folder)
    models = {PLAIN: plain, "ours": model} if plain is not None else {"ours": model}
    extractors = {row: Extractor(inception) for row in models}
    for path in tqdm(paths, unit="picture", desc="decoding"):
        stored = read_latent(path)
        is_scaled = stored.scaled if scaled is None else scaled
        for row, decoder in models.items():
            try:
                size = _latent_size(stored.values, decoder.config)
                latent = inference.read_latent(
                    stored.values, decoder.config, size, scaled=is_scaled is not False, norm=decoder.normalization()
                )
            except inference.InputError as error:
                raise EvaluationError(f"{path}: {error}") from None
            extractors[row].add(images.to_uint8(inference.decode(decoder, latent)[0]))
    features = {row: extractor.features() for row, extractor in extractors.items()}
    return {
        row: (frechet_distance(statistics(f.pool), reference), inception_score(f.logits)[0])
        for row, f in features.items()
    }


def _latent_size(array: np.ndarray, config: ModelConfig) -> tuple[int, int]:
    """Height and width of the picture that a latent of either layout stands for; any other shape is refused later."""
    array = without_frames(array, config)
    shape = array.shape[-3:] if array.ndim > 2 else (1, 1, 1)
    patched = config.latent_channels * config.latent_patch**2
    sides = shape[1:] if shape[0] in (config.latent_channels, patched) else shape[:2]
    pixels = config.downsampling * (config.latent_patch if patched in shape else 1)
    return sides[0] * pixels, sides[-1] * pixels


def text_table(rows: dict[str, tuple[float, float]]) -> str:
    """The paper's text-to-image table as Markdown: its published rows, and what `evaluate_text` measured."""
    together = {f"{name} (published)": v for name, v in PUBLISHED_TEXT.items()}
    together |= {f"{name} (measured)": v for name, v in rows.items()}
    return markdown(["", "FID", "Inception Score"], [[n, f"{f:.2f}", f"{i:.2f}"] for n, (f, i) in together.items()])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, its columns aligned: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        [cell.ljust(w) for cell, w in zip(header, widths, strict=True)],
        ["-" * w for w in widths],
        *([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
