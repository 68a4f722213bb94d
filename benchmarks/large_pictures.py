"""Decodes a large picture whole and in strips: python -m benchmarks.large_pictures [--config F --size 1024 ...].

Prints the time of one decode with what comes before it (start), the peak memory and the difference. Any field of the
config can be set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from asymvq_jax.checkpoints import load_model
from asymvq_jax.config import load_config
from asymvq_jax.strips import decode_in_strips
from benchmarks import contest, subjects
from benchmarks.decode import decode


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_pictures", description=__doc__)
    parser.add_argument("--config", default="configs/base.py")
    parser.add_argument("--size", type=int, default=1024, help="height and width, px")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, ["--model.dtype=float32", *overrides]).model
    with tempfile.TemporaryDirectory() as directory:
        model, _ = subjects.random_weights(config, Path(directory))
        # Not handed over as arrays: both processes make them, and hold no copy that would be counted.
        shared = {"model": model, "size": options.size}
        results = contest.hold(
            [contest.Contender("whole", whole, shared), contest.Contender("in strips", in_strips, shared)],
            rounds=0,
            warm_up=0,
        )
    print(
        f"\ndecode of one picture, {options.config} {' '.join(overrides)}, {options.size} x {options.size} px, float32"
    )
    print(contest.machine())
    print(f"they differ by at most {contest.difference(results)}\n")
    print("| | start | memory |\n| --- | --- | --- |")
    for r in results:
        print(f"| {r.name} | {r.failure or f'{r.start:.1f} s'} | {r.memory / 2**30:.2f} GiB |")
    return int(any(result.failure for result in results))


def whole(model: str, size: int) -> contest.Run:
    """The decode as one program."""
    return decode(model, subjects.pictures(load_model(model).config, 1, size), dtype="float32")


def in_strips(model: str, size: int) -> contest.Run:
    """The decode layer by layer in strips of rows."""
    autoencoder = load_model(model)
    arrays = subjects.pictures(autoencoder.config, 1, size)

    def run() -> Callable[[], np.ndarray]:
        y = decode_in_strips(autoencoder, *(arrays[name] for name in ("latent", "image", "mask")))
        return lambda: y

    return run


if __name__ == "__main__":
    sys.exit(main())
