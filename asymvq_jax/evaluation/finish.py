"""The page's last part: a picture is finished as `asymvq inpaint` does it, compared with the original, and kept."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, PngImagePlugin

import asymvq_jax
from asymvq_jax.errors import InputError, UserError
from asymvq_jax.evaluation.rows import ENLARGED, edge_of
from asymvq_jax.inference import inpaint
from asymvq_jax.inference.blend import BAND, BLENDS, MIXING, Blend
from asymvq_jax.inference.crop import WORK_SIZE, Crop
from asymvq_jax.models.autoencoder import Autoencoder

if TYPE_CHECKING:
    import gradio

# How kept pixels are kept: by the decoder alone, or exactly with each of the ways to set the fill in.
DECODER = "by the decoder"
WAYS = (DECODER, *BLENDS)
# What the page's buttons share, so that one call at a time uses the model.
MODEL = "model"
# The name of the settings among a PNG's texts.
KEY = "asymvq inpaint"
TEXT = """
## Finish

The asymmetric decode as `asymvq inpaint` writes it. Move the slider to compare it with the original; the file that is
saved says how it was made.
"""


def finish(
    model: Autoencoder, image: np.ndarray, mask: np.ndarray, way: str, crop: bool, context: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Inpaints a picture with its own latent.

    Args:
        model: the autoencoder with a condition branch.
        image: (h, w, 3) uint8.
        mask: (h, w, 1), 1 = generate, 0 = preserve.
        way: one of `WAYS`.
        crop: whether only the mask's surroundings are filled.
        context: how much of them; see `Crop`.

    Returns:
        (h, w, 3) uint8, and the settings as options of `asymvq inpaint`.

    Raises:
        InputError: the settings contradict each other.
    """
    settings: dict[str, Any] = {"version": asymvq_jax.__version__}
    if way == DECODER:
        if crop:
            raise InputError("Crop and stitch keeps pixels exactly: choose how the fill is set in.")
        settings["keep"] = "model"
        return inpaint(model, image, mask, keep="model").image, settings
    settings |= {"keep": "exact", "blend": way} | ({"band": BAND} if way in MIXING else {})
    if crop:
        settings |= {"crop-and-stitch": True, "context": context, "work-size": WORK_SIZE}
    chosen = Crop(context) if crop else None
    return inpaint(model, image, mask, keep="exact", blend=cast(Blend, way), crop=chosen).image, settings


def png(image: np.ndarray, settings: dict[str, Any]) -> bytes:
    """A PNG of (h, w, 3) uint8 with its settings as a text."""
    text, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(settings))
    Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def add_finish(
    model: Autoencoder,
    inputs: Sequence[gradio.Component],
    read: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> None:
    """Adds the part to the page that is being made.

    Args:
        model: see `finish`.
        inputs: what holds picture and mask.
        read: gives both, of the inputs' values.
    """
    import gradio as gr

    def press(*values: Any) -> Any:
        *held, way, crop, context = values
        try:
            image, mask = read(*held)
            done, settings = finish(model, image, mask, way, crop, context)
        except UserError as error:
            gr.Warning(str(error), title="Not yet")
            return gr.skip(), gr.skip(), gr.skip()
        # Where the page's other files are, which go with it.
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
        file = folder / "inpainted.png"
        file.write_bytes(png(done, settings))
        edge = tuple(edge_of(each, mask) for each in (image, done))
        return (image, done), edge, gr.DownloadButton(value=str(file), interactive=True)

    gr.Markdown(TEXT)
    with gr.Row():
        # Below each other on a phone.
        wide = 240
        way = gr.Dropdown(
            list(WAYS), value="none", label="Kept pixels (none to poisson: exactly, with that blend)", min_width=wide
        )
        crop = gr.Checkbox(
            label="Crop and stitch", info=f"Fill only the mask's surroundings, at {WORK_SIZE} px", min_width=wide
        )
        context = gr.Slider(
            1, 4, value=1.5, step=0.1, label="Surroundings, as a multiple of the mask's box", min_width=wide
        )
    with gr.Row():
        button = gr.Button("Finish", variant="primary")
        save = gr.DownloadButton("Save with its settings", interactive=False)
    slider, edge = (
        gr.ImageSlider(label=label, format="png", type="numpy", interactive=False)
        for label in ("Before and after", f"The mask's edge, enlarged {ENLARGED} times")
    )
    button.click(press, [*inputs, way, crop, context], [slider, edge, save], concurrency_id=MODEL)
