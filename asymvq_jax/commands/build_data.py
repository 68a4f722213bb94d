"""asymvq build-data."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BuildData:
    """Pack pictures into a TFDS data set of ArrayRecord shards, which training reads at random; or verify one.

    Started again after an interruption, it continues after the last complete shard.
    """

    # Name of the data set: lower-case letters, digits and underscores.
    name: str
    # The data_dir in which the data set lies or is to lie.
    out: str
    # Pictures to pack: a directory tree, a .tar, .tar.gz or .tar.bz2.
    images: str | None = None
    # Verify the data set in --out instead; takes no --images.
    check: bool = False
    # Leave out pictures whose shorter side is below this, px.
    min_side: int = 0
    # Share of the pictures for the validation split.
    held_out: float = 0.02
    # Pictures for the validation split, in any of the forms of --images; then none of --images are held out.
    eval: str | None = None
    # About the size of a shard, MiB.
    shard_mib: float = 256.0
    # Threads that read and decode; by default one for each CPU.
    workers: int | None = None


def work(options: BuildData) -> None:
    """Builds or verifies the data set."""
    from asymvq_jax.data.build import build, check

    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    if options.check and options.images is None:
        check(options.out, options.name, workers=workers)
        return
    if options.check or options.images is None:
        raise ConfigError("expected --images SOURCE and --out TARGET to build, or --out TARGET and --check to verify")
    try:
        build(
            options.images,
            options.out,
            options.name,
            held_out=options.eval or options.held_out,
            min_side=options.min_side,
            shard_mib=options.shard_mib,
            workers=workers,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on after the last complete shard") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    positional = ("out",) if "--check" in words else ("images", "out")
    return command("asymvq build-data", BuildData, work, positional=positional)(words)
