"""Draws samples of the masks: asymvq masks docs/masks.png."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from asymvq_jax.commands.entry import command
from asymvq_jax.data.masks import samples
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.data.masks", description="Draws samples of the masks.")
    parser.add_argument("out", help="the picture: .png, .jpg or .webp")
    options = parser.parse_args(arguments)
    check_writable(options.out, images.FORMATS)
    images.write(options.out, samples())
    return 0
