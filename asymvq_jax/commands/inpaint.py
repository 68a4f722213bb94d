"""asymvq inpaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype
from asymvq_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Decode an edited latent so that the picture's unmasked pixels stay."""

    # The original picture: PNG, JPEG, WebP, ...
    image: str
    # The picture to write: .png, .jpg or .webp.
    out: str
    # A picture of the same size: white = generate, black = preserve. Strokes of one colour, transparency and erased
    # pictures are understood too; what was understood is said. Left out, it is found by comparing --edited with the
    # picture.
    mask: str | None = None
    # The picture as an editor has returned it, changed all over: where it was edited is decoded beside the original's
    # pixels.
    edited: str | None = None
    # A folder of edits, applied in the order of their names: NAME_mask.png with NAME.npy (a latent) or NAME.png (an
    # edited picture), or NAME.png alone. What no mask covers stays as it was, bit for bit.
    edits: str | None = None
    # Also write the mask, white = generated: .png.
    save_mask: str | None = None
    # The model: a run, or anything that `asymvq convert` reads. tiny, tiny-paper and tiny-plain are small models inside
    # the package, for trying things out.
    checkpoint: str = "tiny"
    # An edited latent from a diffusion model (.npy, .npz, .safetensors, .pt, ComfyUI's .latent); by default the
    # picture's own.
    latent: str | None = None
    # The latent's layout; by default found by its shape and by comparison with the picture's own latent.
    latent_layout: Literal["channels-first", "channels-last"] | None = None
    # Whether the latent has been multiplied by the scaling factor, as diffusion models have it; by default found by
    # comparison with the picture's own latent.
    latent_scaled: Literal["yes", "no"] | None = None
    # The same as --latent-scaled yes.
    scaled_latent: bool = False
    # The same as --latent-scaled no.
    unscaled_latent: bool = False
    # What of the mask's file is the mask; by default found.
    mask_channel: Literal["grey", "red", "green", "blue", "alpha"] | None = None
    # Black = generate, white = preserve.
    invert_mask: bool = False
    # Greys of the mask blend; without this the threshold is 0.5.
    soft_mask: bool = False
    # model: what the decoder makes. exact: also paste the preserved pixels back. By default model, or exact with
    # --blend, --band, --crop-and-stitch and --edits.
    keep: Literal["model", "exact"] | None = None
    # How exact sets the fill into the picture. none: up to the mask's edge. feather: with a linear transition around
    # the mask. multiband: octave by octave, and a transition. tone: a smooth tone, fitted along the edge, is added to
    # the fill. poisson: the fill's gradients with the colours around it. By default none, with which every kept pixel
    # stays as it was, or feather with --band.
    blend: Literal["none", "feather", "multiband", "tone", "poisson"] | None = None
    # Width of the transition of feather and multiband, px; 8 by default.
    band: int | None = None
    # Fill only the surroundings of the mask, scaled to --work-size, and leave the rest of the picture alone.
    crop_and_stitch: bool = False
    # How much of the surroundings: the side of a square, as a multiple of the longer side of the mask's box.
    context: float = 1.5
    # The longer side, px, at which the surroundings are filled; a multiple of the model's downsampling.
    work_size: int = 512
    # For a picture that one device's memory cannot hold, or of more pixels than are read otherwise. strips: in strips
    # of rows on one device, which is slower; devices: its rows split over all devices.
    large: Literal["strips", "devices"] | None = None
    # How a diffusion model scales the model's latents, (latent - shift) * scaling, where its file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Inpaint) -> None:
    """Inpaints, and prints what was done."""
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.inference.crop import Crop
    from asymvq_jax.inference.edits import MaskReading
    from asymvq_jax.inference.task import Task, run

    fields = dict(vars(options))
    cropping, crop = fields.pop("crop_and_stitch"), Crop(fields.pop("context"), fields.pop("work_size"))
    if not cropping and crop != Crop():
        raise InputError("--context and --work-size belong to --crop-and-stitch, which is missing; give it too")
    said = {fields.pop("latent_scaled"), "yes" if fields.pop("scaled_latent") else None,
            "no" if fields.pop("unscaled_latent") else None} - {None}  # fmt: skip
    if len(said) > 1:
        raise InputError("--scaled-latent, --unscaled-latent and --latent-scaled contradict each other: give one")
    masks = MaskReading(fields.pop("soft_mask"), fields.pop("mask_channel"), fields.pop("invert_mask"))
    keep_compiled_programs()
    print(
        run(
            Task(
                **fields,
                masks=masks,
                crop=crop if cropping else None,
                latent_scaled=said.pop() == "yes" if said else None,
            )
        )
    )


main = command("asymvq inpaint", Inpaint, work)
