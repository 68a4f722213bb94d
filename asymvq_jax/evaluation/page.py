"""A web page on which masks are painted, and three ways of decoding are compared."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from asymvq_jax import inference
from asymvq_jax.config import DataConfig
from asymvq_jax.data.sources import open_source
from asymvq_jax.errors import InputError, UserError
from asymvq_jax.evaluation.finish import MODEL, add_finish
from asymvq_jax.evaluation.mask_file import FOUND, add_mask_file, read_mask_file
from asymvq_jax.evaluation.metrics.image import mean_squared_error, psnr
from asymvq_jax.evaluation.rows import decode_ours, decode_plain, hard_paste
from asymvq_jax.files import images
from asymvq_jax.files.masks import Mask, generated, percent, resized
from asymvq_jax.models.autoencoder import Autoencoder

if TYPE_CHECKING:
    import gradio

# The longest side that the page decodes, px.
LONGEST = 1024

INTRODUCTION = """
# Which pixels survive the decoder?

Stable Diffusion edits a picture as a latent, and decoding that latent also changes pixels that nobody asked to edit.
Here three ways of decoding the **same latent** stand side by side. It is the picture's own: no diffusion model runs on
this page, so the painted part shows what a decoder makes of the latent alone.
"""
STEPS = f"""
1. Load a picture (one larger than {LONGEST} px is scaled down to that), or choose an example.
2. Paint over the part that is to be generated; the eraser and undo are beside the brush. A mask file is added to what
   is painted. All the rest is to be kept.
3. Decode. The first time takes longest for every size of picture, which is compiled for.
"""
PLAIN = """
### Plain decode
The decoder that came with the encoder. It sees the latent only.
"""
PLAIN_OURS = """
### Plain decode (asymmetric decoder)
No plain autoencoder was named (`--plain`), so **the asymmetric decoder without picture and mask** stands in.
"""
PASTE = """
### Paste
The plain decode, with the original's pixels pasted back: perfect by definition, but look at the mask's edge.
"""
ASYMMETRIC = """
### Asymmetric decode
The decoder that sees the kept pixels as well as the latent. Nothing is pasted.
"""


class Decoded(NamedTuple):
    """One way's picture and its error map, (h, w, 3) uint8 each, and how well it preserves the unmasked pixels.

    Both numbers are as in `asymvq_jax.evaluation.metrics.image`; NaN where the mask covers the whole picture.
    """

    image: np.ndarray
    error_map: np.ndarray
    preservation_error: float
    psnr: float


def compare(model: Autoencoder, plain: Autoencoder | None, image: np.ndarray, mask: np.ndarray) -> tuple[Decoded, ...]:
    """Decodes a picture's own latent in three ways.

    Args:
        model: the autoencoder with a condition branch.
        plain: the one whose decoder came with the encoder; None: `model` without condition.
        image: (h, w, 3) uint8, of any size.
        mask: (h, w, 1), 1 = generate, 0 = preserve.

    Returns:
        The plain decode, the same with the original's preserved pixels pasted over it, and the asymmetric decode.
    """
    latent = inference.encode(model, images.to_float(image)[None])
    plain_image = decode_plain(plain or model, image, latent)
    ways = plain_image, hard_paste(plain_image, image, mask), decode_ours(model, image, mask, latent)
    kept = ~generated(mask)[..., 0]
    return tuple(
        Decoded(way, images.error_map(way, image), mean_squared_error(way, image, kept), psnr(way, image, kept))
        for way in ways
    )


def load(path: str) -> np.ndarray:
    """Reads a picture of any kind as (h, w, 3) uint8, scaled down where a side is longer than `LONGEST`.

    Raises:
        ImageError: it is not a picture.
    """
    image = images.decode(Path(path).read_bytes(), Path(path).name)
    scale = LONGEST / max(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def read_painting(painting: dict[str, Any] | None, file: Mask | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads what was painted on the page.

    Args:
        painting: the paths of the files "background", the picture, and "layers", of its size, painted in white; as
            Gradio's ImageEditor gives them.
        file: a mask that is added to the painted one; of a picture that was scaled down, its own size's.

    Returns:
        The picture, (h, w, 3) uint8, and its mask, (h, w, 1) float32.

    Raises:
        InputError: no picture, or nothing to generate.
    """
    if not painting or not painting["background"]:
        raise InputError("There is no picture yet: load one, or choose an example.")
    image = images.read(painting["background"])
    mask = np.zeros((*image.shape[:2], 1), np.float32)
    if file is not None:
        mask = np.maximum(mask, resized(file, (image.shape[0], image.shape[1])).values)
    for layer in painting["layers"]:
        mask = np.maximum(mask, images.read_mask(layer))
    if not mask.any():
        raise InputError("Nothing is painted yet: paint over what is to be generated, or choose a mask file.")
    return image, mask


def read_inputs(
    painting: dict[str, Any] | None, size: tuple[int, int] | None, path: str | None, channel: str, invert: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask of what the page's inputs hold.

    Args:
        painting: see `read_painting`.
        size: height and width of the picture's own file, px; None: the editor was cleared, which gives a white picture,
            as one that was loaded may be.
        path: the mask file; None: there is none.
        channel, invert: see `read_mask_file`.

    Raises:
        UserError: no picture, nothing to generate, or a mask file that is refused.
    """
    file = read_mask_file(path, channel, invert, size) if path and size else None
    return read_painting(painting if size else None, file)


def describe(decoded: Decoded) -> str:
    """The numbers of one way as Markdown."""
    if np.isnan(decoded.psnr):
        return "The mask covers the whole picture: no pixels to keep."
    decibels = "∞" if np.isinf(decoded.psnr) else f"{decoded.psnr:.1f}"
    # Two spaces end a line.
    return (
        f"Kept pixels: PSNR **{decibels} dB**  \npreservation error **{decoded.preservation_error * 1e5:,.1f}** x 1e-5"
    )


def page(model: Autoencoder, plain: Autoencoder | None) -> gradio.Blocks:
    """The page, not yet served; arguments as in `compare`."""
    # Read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    def put(path: str) -> Any:
        try:
            return load(path), images.read_size(path)
        except UserError as error:
            gr.Warning(str(error), title="Not loaded")
            return gr.skip(), gr.skip()

    # The page's clients need not name what has a default here.
    def press(painting: Any, size: Any, path: str | None = None, channel: str = FOUND, invert: bool = False) -> Any:
        try:
            image, mask = read_inputs(painting, size, path, channel, invert)
        except UserError as error:
            gr.Warning(str(error), title="Not yet")
            return gr.skip()
        height, width, _ = image.shape
        ways = compare(model, plain, image, mask)
        parts = [part for way in ways for part in (way.image, describe(way), way.error_map)]
        return [f"{width} x {height} px, {percent(mask)} to be generated.", *parts]

    examples = _examples()
    blocks: gradio.Blocks
    with gr.Blocks(title="asymvq-jax", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        # Of the picture's own file; None where there is none.
        size = gr.State(images.read_size(examples[0]))
        with gr.Row():
            with gr.Column(scale=3):
                editor = gr.ImageEditor(
                    examples[0],
                    label="Picture and mask",
                    placeholder="Load a picture, or choose an example",
                    type="filepath",
                    format="png",
                    sources=(),
                    brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                    layers=False,
                    transforms=(),
                    buttons=["fullscreen"],
                    height=520,
                )
            with gr.Column(scale=2):
                gr.Markdown(STEPS)
                upload = gr.UploadButton("Load a picture", file_types=["image"])
                # Not gr.Examples, under which the editor sends its contents dozens of times.
                gallery = gr.Dataset(
                    label="Examples", components=["image"], samples=[[path] for path in examples], type="index"
                )
                mask_file = add_mask_file(size)
                button = gr.Button("Decode", variant="primary")
                status = gr.Markdown()
        outputs = [status, *_results(plain is not None)]
        inputs = [editor, size, *mask_file]
        editor.clear(lambda: None, outputs=size, show_progress="hidden")
        gallery.click(lambda index: put(examples[index]), gallery, [editor, size], show_progress="hidden")
        upload.upload(put, upload, [editor, size], show_progress="hidden")
        button.click(press, inputs, outputs, concurrency_id=MODEL)
        add_finish(model, inputs, read_inputs)
    return blocks


def _results(with_plain: bool) -> list[gradio.Component]:
    """The three ways' pictures, numbers and error maps."""
    import gradio as gr

    outputs: list[gradio.Component] = []
    shown: dict[str, Any] = {
        "format": "png",
        "interactive": False,
        "show_label": False,
        "buttons": ["download", "fullscreen"],
    }
    with gr.Row():
        for text in (PLAIN if with_plain else PLAIN_OURS, PASTE, ASYMMETRIC):
            with gr.Column():
                gr.Markdown(text)
                picture = gr.Image(**shown)
                numbers = gr.Markdown()
                gr.Markdown("Error x 4, black where the picture is as the original:")
                error = gr.Image(**shown)
                outputs += [picture, numbers, error]
    return outputs


def _examples() -> list[str]:
    """Photographs inside installed packages, those first that the demo was not trained on."""
    halves = [open_source(DataConfig(source="photos"), train=train) for train in (False, True)]
    return [half.name(index) for half in halves for index in range(min(len(half), 2))]


def serve(model: Autoencoder, plain: Autoencoder | None, host: str, port: int) -> None:
    """Serves the page until it is interrupted; the first arguments are as in `compare`.

    Raises:
        UserError: the address cannot be used.
    """
    # What is loaded and shown goes with the server, and no other user's files are in the way.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(model, plain)
        from gradio.themes import Default

        try:
            blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                share=False,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                quiet=True,
                theme=Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"the page cannot be served at {host}:{port} (--host, --port): {error}") from None
        print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
