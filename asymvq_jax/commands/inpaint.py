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
    # A picture of the same size: white = generate, black = preserve. Strokes of one colour, transparency and erased
    # pictures are understood too; what was understood is said.
    mask: str
    # The picture to write: .png, .jpg or .webp.
    out: str
    # The model: a run, or anything that `asymvq convert` reads. tiny, tiny-paper and tiny-plain are small models inside
    # the package, for trying things out.
    checkpoint: str = "tiny"
    # An edited latent from a diffusion model (.npy, .npz, .safetensors, .pt, ComfyUI's .latent); by default the
    # picture's own.
    latent: str | None = None
    # The latent's layout; by default found by its shape and by comparison with the picture's own latent.
    latent_layout: Literal["channels-first", "channels-last"] | None = None
    # The latent has been multiplied by the scaling factor, as diffusion models have it; by default found by comparison
    # with the picture's own latent.
    scaled_latent: bool = False
    # The latent has not been multiplied by the scaling factor.
    unscaled_latent: bool = False
    # What of the mask's file is the mask; by default found.
    mask_channel: Literal["grey", "red", "green", "blue", "alpha"] | None = None
    # Black = generate, white = preserve.
    invert_mask: bool = False
    # Greys of the mask blend; without this the threshold is 0.5.
    soft_mask: bool = False
    # model: what the decoder makes. exact: also paste the preserved pixels back.
    keep: Literal["model", "exact"] = "model"
    # How exact sets the fill into the picture. none: up to the mask's edge. feather: with a linear transition around
    # the mask. multiband: octave by octave, and a transition. tone: a smooth tone, fitted along the edge, is added to
    # the fill. poisson: the fill's gradients with the colours around it.
    blend: Literal["none", "feather", "multiband", "tone", "poisson"] = "feather"
    # Width of the transition of feather and multiband, px.
    band: int = 8
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
    from asymvq_jax.inference.task import Task, run

    if options.scaled_latent and options.unscaled_latent:
        raise InputError("--scaled-latent and --unscaled-latent exclude each other")
    fields = dict(vars(options))
    scaled, unscaled = fields.pop("scaled_latent"), fields.pop("unscaled_latent")
    keep_compiled_programs()
    print(run(Task(**fields, latent_scaled=True if scaled else False if unscaled else None)))


main = command("asymvq inpaint", Inpaint, work)
