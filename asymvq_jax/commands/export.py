"""Writes the decoder to a file for servers: asymvq export CHECKPOINT FILE --size 512x512 [--batch 4]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from asymvq_jax.commands.entry import command
from asymvq_jax.config import DTYPES
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable, write_bytes
from asymvq_jax.inference.export import PLATFORMS, SUFFIX, export_decoder
from asymvq_jax.models.checkpoints import load_model


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run, one of its steps, or what asymvq_jax.convert wrote")
    parser.add_argument("file", help=f"what to write, *{SUFFIX}")
    parser.add_argument("--size", default="512x512", help="height x width of the pictures, px (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a call (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute type; default: the checkpoint's")
    options = parser.parse_args(arguments)
    check_writable(options.file, (SUFFIX,))
    size = images.parse_size("--size", options.size)
    model = load_model(options.checkpoint, **({"dtype": options.dtype} if options.dtype else {}))
    program = export_decoder(model, options.batch, size)
    data = program.serialize()
    write_bytes(options.file, data)
    inputs = ", ".join(f"{a.dtype}{list(a.shape)}" for a in program.in_avals)
    print(f"{options.file}: {len(data) / 1e6:.1f} MB for {', '.join(PLATFORMS)}; takes {inputs}")
    return 0
