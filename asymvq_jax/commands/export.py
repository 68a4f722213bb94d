"""asymvq export."""

from __future__ import annotations

from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the decoder as one file that serves with JAX alone, without this package."""

    # The model: a run, or anything that `asymvq convert` reads.
    checkpoint: str
    # The file to write, *.jax.
    out: str
    # HEIGHTxWIDTH of the pictures, px.
    size: str = "512x512"
    # Pictures a call.
    batch: int = 1
    # How a diffusion model scales the model's latents, (latent - shift) * scaling, where its file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Export) -> None:
    """Writes the file and prints what it takes."""
    from asymvq_jax.convert.convert import given_factors, read_model
    from asymvq_jax.files import images
    from asymvq_jax.files.outputs import check_writable, write_bytes
    from asymvq_jax.inference.export import PLATFORMS, SUFFIX, export_decoder

    check_writable(options.out, (SUFFIX,))
    size = images.parse_size("--size", options.size)
    model = read_model(
        options.checkpoint, given_factors(options.scaling_factor, options.shift_factor), dtype=options.dtype
    )
    program = export_decoder(model, options.batch, size)
    data = bytes(program.serialize())
    write_bytes(options.out, data)
    inputs = ", ".join(f"{a.dtype}{list(a.shape)}" for a in program.in_avals)
    print(f"{options.out}: {len(data) / 1e6:.1f} MB for {', '.join(PLATFORMS)}; takes {inputs}")


main = command("asymvq export", Export, work, positional=("checkpoint", "out"))
