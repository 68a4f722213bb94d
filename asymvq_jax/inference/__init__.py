"""Encode, decode and inpaint pictures of any size; for scripts and notebooks."""

from asymvq_jax.errors import InputError
from asymvq_jax.inference.blend import composite
from asymvq_jax.inference.whole import (
    Inpainting,
    check_condition,
    check_mask,
    decode,
    encode,
    inpaint,
    pad,
    paste,
    place,
    read_latent,
)

__all__ = [
    "Inpainting",
    "InputError",
    "check_condition",
    "check_mask",
    "composite",
    "decode",
    "encode",
    "inpaint",
    "pad",
    "paste",
    "place",
    "read_latent",
]
