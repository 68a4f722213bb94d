"""Converts weights: python -m asymvq_jax.convert SOURCE TARGET [--to jax|diffusers|ldm]."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from asymvq_jax.commands.entry import command
from asymvq_jax.convert.convert import convert, describe


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.convert", description=__doc__)
    parser.add_argument("source", help="JAX checkpoint, diffusers folder, or original .ckpt / .safetensors")
    parser.add_argument("target", help="what to write; must not exist")
    parser.add_argument("--to", choices=("jax", "diffusers", "ldm"), default="jax", help="form of the target")
    scale = "of the latent of an original checkpoint, which does not say (default: {})"
    parser.add_argument(
        "--scaling-factor", type=float, help=scale.format("Stable Diffusion 1's 0.18215, 1 with a codebook")
    )
    parser.add_argument("--shift-factor", type=float, help=scale.format("0"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    model = convert(
        options.source,
        options.target,
        options.to,
        scaling_factor=options.scaling_factor,
        shift_factor=options.shift_factor,
    )
    print(f"{options.target}: {options.to}, {describe(model)}")
    return 0
