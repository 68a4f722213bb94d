"""asymvq convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asymvq_jax.commands.entry import command


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert weights between this package, diffusers and the original PyTorch files."""

    # A run, a model of this package, a diffusers folder, or an original .ckpt or .safetensors file.
    checkpoint: str
    # What to write: a folder, or for ldm a .safetensors file. Must not exist.
    out: str
    # The form of what is written.
    to: Literal["jax", "diffusers", "ldm"] = "jax"
    # Of the latent of an original checkpoint, which does not say; by default Stable Diffusion 1's 0.18215, and 1 for a
    # model with a codebook.
    scaling_factor: float | None = None
    # Of the latent of an original checkpoint, which does not say; by default 0.
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
