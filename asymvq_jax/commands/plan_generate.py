"""Plans Stable Diffusion's denoising loop: python -m asymvq_jax.plan.generate --topology v5e:2x2 [--per-chip 1 ...].

At Stable Diffusion 1.5's sizes, or at those of a pipeline folder that one has, of which only the configuration is read.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from asymvq_jax.commands.entry import command
from asymvq_jax.diffusion.unet import UNetConfig, read_config
from asymvq_jax.errors import UserError
from asymvq_jax.files import images
from asymvq_jax.files.weights import read_json
from asymvq_jax.plan import report
from asymvq_jax.plan.chips import open_topology
from asymvq_jax.plan.compile import plan_denoising

# Pixels a side of a latent's, and the tokens of CLIP's texts.
DOWNSAMPLING, TOKENS = 8, 77


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 (also where the plan does not fit), or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.plan.generate", description=__doc__)
    parser.add_argument("--topology", default="local", help="v5e:2x2, v5p:2x2x1, ...; default: the devices present")
    parser.add_argument("--per-chip", type=int, default=1, help="pictures a chip")
    parser.add_argument("--size", default="512x512", metavar="HEIGHTxWIDTH", help="of the pictures, px")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--unet", metavar="DIR", help="the unet/ of a pipeline folder; default: the sizes of 1.5")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("jax").setLevel(logging.WARNING)
    unet = UNetConfig()
    if options.unet:
        file = Path(options.unet) / "config.json"
        unet = read_config(read_json(file), str(file))
    height, width = images.parse_size("--size", options.size)
    multiple = DOWNSAMPLING * unet.downsampling
    if height % multiple or width % multiple or not height or not width:
        raise UserError(f"--size {options.size}: expected multiples of {multiple} px")
    if min(options.per_chip, options.steps) < 1:
        raise UserError(f"--per-chip {options.per_chip} --steps {options.steps}: expected 1 or more of each")
    if options.topology != "local":
        jax.config.update("jax_platforms", "cpu")
    target = open_topology(options.topology)
    batch = options.per_chip * len(target.devices)
    shape = (batch, height // DOWNSAMPLING, width // DOWNSAMPLING)
    program = plan_denoising(unet, target, shape, options.steps, TOKENS)
    print(
        f"{batch} pictures of {width} x {height} px, {options.steps} steps with guidance, bfloat16, on {target.name}\n"
        f"compiled with {target.compiler}"
    )
    print(report.listing("denoising", program, batch, target))
    return 0
