"""Writes the models inside the package from trained ones: asymvq benchmark embed --photos DIR.

Measures each decoder on whole photographs first, from the float16 weights that are written.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.data.sources import list_pictures
from asymvq_jax.evaluation.metrics.image import psnr
from asymvq_jax.evaluation.rows import markdown
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.checkpoints import load_model
from asymvq_jax.models.embedded import FOLDER, MODELS, embedded_parameters, write_embedded
from asymvq_jax.models.parameters import merge


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the models inside the package, all of one encoder, and print what they reconstruct."""

    # Photographs that none of them was trained on.
    photos: str
    # The runs, or checkpoints, of the plain autoencoder, the asymmetric decoder as published, and the harmonising one.
    plain: str = "runs/tiny/first_stage"
    paper: str = "runs/tiny/asymmetric"
    harmonised: str = "runs/tiny/harmonised"
    # The photographs' shorter side, to which they are reduced; the square in the middle is measured. px.
    size: int = 256
    # The models' scaling factor: one over the standard deviation of their latents, which is known only after the first
    # stage's training; by default the runs'.
    scaling_factor: float | None = None
    # Only measure, what the package holds.
    measure: bool = False


def work(options: Embed) -> None:
    """Writes the files, and prints a table."""
    pictures = [square(images.read(path), options.size) for path in list_pictures(options.photos, "--photos")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = FOLDER if options.measure else Path(temporary)
        if not options.measure:
            runs = {"tiny-plain": options.plain, "tiny-paper": options.paper, "tiny": options.harmonised}
            scale = {} if options.scaling_factor is None else {"scaling_factor": options.scaling_factor}
            size = write_embedded({name: load_model(run, **scale) for name, run in runs.items()}, folder)
            print(f"{size / 1e6:.2f} MB")
        rows = [[name, *(f"{value:.2f}" for value in measure(name, folder, pictures))] for name in MODELS]
        print(markdown(["", "PSNR, dB", "worst", "with a mask: kept", "masked"], rows))
        if not options.measure:
            FOLDER.mkdir(exist_ok=True)
            for file in folder.iterdir():
                shutil.copy(file, FOLDER / file.name)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The square in the middle of a picture whose shorter side is reduced to `size` px by area."""
    h, w = image.shape[:2]
    scale = size / min(h, w)
    image = cv2.resize(image, (max(size, round(w * scale)), max(size, round(h * scale))), interpolation=cv2.INTER_AREA)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def measure(name: str, folder: Path, pictures: list[np.ndarray]) -> tuple[float, float, float, float]:
    """PSNR, dB: the mean and the worst of the whole picture without condition; of kept and masked pixels with one."""
    config, params = embedded_parameters(name, folder)
    model = merge(structure(config)[0], params)
    whole, kept, masked = [], [], []
    for image in pictures:
        pixels = images.to_float(image)[None]
        latent = inference.encode(model, pixels)
        everywhere = np.ones(image.shape[:2], bool)
        whole.append(psnr(images.to_uint8(inference.decode(model, latent)[0]), image, everywhere))
        if config.condition:
            mask = ellipse(*image.shape[:2])
            result = images.to_uint8(inference.decode(model, latent, pixels, mask[None])[0])
            kept.append(psnr(result, image, mask[..., 0] == 0))
            masked.append(psnr(result, image, mask[..., 0] == 1))
    return float(np.mean(whole)), min(whole), *(float(np.mean(v)) if v else float("nan") for v in (kept, masked))


def ellipse(h: int, w: int) -> np.ndarray:
    """A mask in the middle that covers about a tenth of the picture, (h, w, 1) float32."""
    mask = np.zeros((h, w), np.float32)
    cv2.ellipse(mask, (w // 2, h // 2), (w // 5, h // 6), 20, 0, 360, 1.0, -1)
    return mask[..., None]


main = command("asymvq benchmark embed", Embed, work)
