"""Makes a TFDS data set of pictures, or verifies one: asymvq build-data SOURCE TARGET --name my_photos."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from asymvq_jax.commands.entry import INTERRUPTED, command
from asymvq_jax.data.build import build, check


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.data.build", description=__doc__)
    parser.add_argument("source", nargs="?", help="pictures: a directory tree, a .tar or a .tar.gz")
    parser.add_argument("target", help="the data_dir in which the data set lies or is to lie")
    parser.add_argument("--name", required=True, help="of the data set: lower-case letters, digits and underscores")
    parser.add_argument("--check", action="store_true", help="verify the data set in TARGET; takes no SOURCE")
    parser.add_argument("--min-side", type=int, default=0, help="leave out pictures whose shorter side is below this")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the pictures for the validation split")
    parser.add_argument("--eval", help="pictures for the validation split; then none of SOURCE are held out")
    parser.add_argument("--shard-mib", type=float, default=256, help="about the size of a shard, MiB")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that read and decode")
    options = parser.parse_intermixed_args(arguments)
    if options.check == (options.source is not None):
        parser.error("expected SOURCE and TARGET, or TARGET and --check")
    try:
        if options.check:
            check(options.target, options.name, workers=options.workers)
        else:
            build(
                options.source,
                options.target,
                options.name,
                held_out=options.eval or options.held_out,
                min_side=options.min_side,
                shard_mib=options.shard_mib,
                workers=options.workers,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last complete shard", file=sys.stderr)
        return INTERRUPTED
    return 0
