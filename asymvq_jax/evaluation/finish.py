"""The page's last part: a picture is finished as `asymvq inpaint` does it, compared with the original, and kept."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, PngImagePlugin

import asymvq_jax
from asymvq_jax.errors import InputError, UserError
from asymvq_jax.inference import inpaint
from asymvq_jax.inference.blend import BAND, BLENDS, MIXING, Blend
from asymvq_jax.inference.crop import WORK_SIZE, Crop
from asymvq_jax.models.autoencoder import Autoencoder

if TYPE_CHECKING:
    import gradio

# How kept pixels are kept: by the decoder alone, or exactly with each of the ways to set the fill in.
DECODER = "by the decoder"
WAYS = (DECODER, *BLENDS)
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
    editor: gradio.ImageEditor,
    loaded: gradio.State,
    read: Callable[[dict[str, Any] | None], tuple[np.ndarray, np.ndarray]],
) -> None:
    """Adds the part to the page that is being made.

    Args:
        model: see `finish`.
        editor: where the mask is painted.
        loaded: whether there is a picture.
        read: gives picture and mask of what the editor holds.
    """
    import gradio as gr

    def press(painting: dict[str, Any] | None, loaded: bool, way: str, crop: bool, context: float) -> Any:
        try:
            image, mask = read(painting if loaded else None)
            done, settings = finish(model, image, mask, way, crop, context)
        except UserError as error:
            gr.Warning(str(error), title="Not yet")
            return gr.skip(), gr.skip()
        # Where the page's other files are, which go with it.
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
        file = folder / "inpainted.png"
        file.write_bytes(png(done, settings))
        return (image, done), gr.DownloadButton(value=str(file), interactive=True)

    gr.Markdown(TEXT)
    with gr.Row():
        way = gr.Dropdown(list(WAYS), value="none", label="Kept pixels (none to poisson: exactly, with that blend)")
        crop = gr.Checkbox(label="Crop and stitch: fill only the mask's surroundings, at 512 px")
        context = gr.Slider(1, 4, value=1.5, step=0.1, label="Surroundings, as a multiple of the mask's box")
    with gr.Row():
        button = gr.Button("Finish", variant="primary")
        save = gr.DownloadButton("Save with its settings", interactive=False)
    slider = gr.ImageSlider(label="Before and after", format="png", type="numpy", interactive=False)
    button.click(press, [editor, loaded, way, crop, context], [slider, save])
