"""Encode, decode and inpaint pictures of any size; for scripts and notebooks."""

from asymvq_jax.errors import InputError
from asymvq_jax.inference.blend import composite
from asymvq_jax.inference.crop import Crop
from asymvq_jax.inference.fills import Fills
from asymvq_jax.inference.inpainting import (
    InpaintResult,
    Keeping,
    check_mask,
    compose,
    inpaint,
    inpaint_picture,
    margin_of,
    paste,
    ways_of_keeping,
)
from asymvq_jax.inference.latents import denormalize_latent, normalize_latent, read_latent, understand
from asymvq_jax.inference.whole import check_condition, decode, encode, pad, place

# Its name in release 0.1.
Inpainting = InpaintResult

__all__ = [
    "Crop",
    "Fills",
    "InpaintResult",
    "Inpainting",
    "InputError",
    "Keeping",
    "check_condition",
    "check_mask",
    "compose",
    "composite",
    "decode",
    "denormalize_latent",
    "encode",
    "inpaint",
    "inpaint_picture",
    "margin_of",
    "normalize_latent",
    "pad",
    "paste",
    "place",
    "read_latent",
    "understand",
    "ways_of_keeping",
]
