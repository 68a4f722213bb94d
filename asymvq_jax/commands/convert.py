"""asymvq convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asymvq_jax.commands.entry import command


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert weights between this package, diffusers and the original PyTorch files."""

    # A run, a model of this package, a diffusers folder, or a file of weights: safetensors or PyTorch's.
    checkpoint: str
    # What to write: a folder, or for ldm a .safetensors or .ckpt file. Must not exist.
    out: str
    # The form of what is written.
    to: Literal["jax", "diffusers", "ldm"] = "jax"
    # How a diffusion model scales the model's latents, (latent - shift) * scaling, where the source does not say it.
    # Files say it in their metadata, their scale_factor, or the diffusion model in them; where none does, a line says
    # what is taken, or the command asks.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None


def work(options: Convert) -> None:
    """Converts and prints what was written."""
    from asymvq_jax.convert.convert import convert, describe

    model = convert(
        options.checkpoint,
        options.out,
        options.to,
        scaling_factor=options.scaling_factor,
        shift_factor=options.shift_factor,
    )
    print(f"{options.out}: {options.to}, {describe(model)}")


main = command("asymvq convert", Convert, work, positional=("checkpoint", "out"))
