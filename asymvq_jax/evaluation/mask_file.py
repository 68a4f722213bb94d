"""The page's mask file: read as `asymvq inpaint` reads masks, and added to what is painted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import asymvq_jax.files.masks as masks
from asymvq_jax.errors import InputError, UserError
from asymvq_jax.files.pictures import read_file

if TYPE_CHECKING:
    import gradio

# The choice of channel that leaves it to what the file says.
FOUND = "what the file says"


def read_mask_file(path: str, channel: str, invert: bool, size: tuple[int, int]) -> masks.Mask:
    """Reads a mask for the picture on the page.

    Args:
        path: the file.
        channel: what of it is the mask: `FOUND`, or one of `masks.CHANNELS`.
        invert: whether black is to be generated.
        size: height and width of the picture's own file, px.

    Raises:
        UserError: it is not a mask, it could mean two things, or it has another size than the picture.
    """
    name = Path(path).name
    chosen = None if channel == FOUND else cast(masks.Channel, channel)
    mask = masks.decode_mask(read_file(path), name, channel=chosen, invert=invert)
    if mask.size != size:
        (h, w), (height, width) = mask.size, size
        raise InputError(
            f"mask {name} has {w} x {h} px and the picture {width} x {height} px: expected equal sizes"
            + masks.turned(mask.size, size)
        )
    return mask


def note(path: str | None, channel: str, invert: bool, size: tuple[int, int] | None) -> str:
    """How the file was read or why it is refused, as Markdown; the arguments are as the page's inputs give them."""
    if path is None:
        return ""
    name = Path(path).name
    if size is None:
        return f"Mask file {name}: waits for a picture."
    try:
        mask = read_mask_file(path, channel, invert, size)
    except UserError as error:
        return f"**Refused:** {error}"
    return mask.warning(name) or f"{name}: {mask.describe()}"


def add_mask_file(size: gradio.State) -> list[gradio.Component]:
    """Adds the part to the page that is being made.

    Args:
        size: height and width of the picture's own file, px; None where there is no picture.

    Returns:
        What gives the first three arguments of `read_mask_file`.
    """
    import gradio as gr

    with gr.Accordion("Mask file: added to what is painted", open=False):
        file = gr.File(label="Mask file", file_types=["image", ".npy"], height=130)
        channel = gr.Dropdown([FOUND, *masks.CHANNELS], value=FOUND, label="What of it is the mask (--mask-channel)")
        invert = gr.Checkbox(label="Black is to be generated (--invert-mask)")
    # Outside, so that a file that counts is seen also where the part is closed.
    said = gr.Markdown()
    inputs: list[Any] = [file, channel, invert, size]
    gr.on([part.change for part in inputs], note, inputs, said, show_progress="hidden")
    return [file, channel, invert]
