"""asymvq plan denoising."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asymvq_jax.commands.entry import command
from asymvq_jax.errors import ConfigError

# Pixels a side of a latent's, and the tokens of CLIP's texts.
DOWNSAMPLING, TOKENS = 8, 77


@dataclass(frozen=True, kw_only=True)
class PlanDenoising:
    """Plan Stable Diffusion's denoising loop: its memory and least time on chips that need not be present."""

    # A slice such as v5e:2x2 or v5p:2x2x1; local: the devices present.
    topology: str = "local"
    # Pictures a chip.
    per_chip: int = 1
    # HEIGHTxWIDTH of the pictures, px.
    size: str = "512x512"
    # Steps of the sampler.
    steps: int = 50
    # The unet/ folder of a pipeline, of which only the configuration is read; by default Stable Diffusion 1.5's sizes.
    unet: str | None = None


def work(options: PlanDenoising) -> None:
    """Compiles and prints what one chip needs; returns also where that does not fit."""
    import jax

    from asymvq_jax.diffusion.unet import UNetConfig, read_config
    from asymvq_jax.files import images
    from asymvq_jax.files.addresses import check_local
    from asymvq_jax.files.weights import read_json
    from asymvq_jax.plan import report
    from asymvq_jax.plan.chips import open_topology
    from asymvq_jax.plan.compile import plan_denoising

    unet = UNetConfig()
    if options.unet:
        check_local(options.unet, "--unet")
        file = Path(options.unet) / "config.json"
        unet = read_config(read_json(file), str(file))
    height, width = images.parse_size("--size", options.size)
    multiple = DOWNSAMPLING * unet.downsampling
    if height % multiple or width % multiple or not height or not width:
        raise ConfigError(f"--size {options.size}: expected multiples of {multiple} px")
    if min(options.per_chip, options.steps) < 1:
        raise ConfigError(f"--per-chip {options.per_chip} --steps {options.steps}: expected 1 or more of each")
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


main = command("asymvq plan denoising", PlanDenoising, work, clock=True)
