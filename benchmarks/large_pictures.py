"""Decodes a large picture whole and in strips: asymvq benchmark large_pictures --config base [--size 1024 ...].

Prints what the programs need of the device's memory, the time of one decode with what comes before it (start), the
process's peak memory (on a CPU the device's and the host's) and the difference. Any field of the config can be set.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
from flax import nnx

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.config import Settings
from asymvq_jax.inference import strips, whole
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.blocks import Conv
from asymvq_jax.models.checkpoints import load_model, save_model
from benchmarks import contest, subjects


@dataclass(frozen=True, kw_only=True)
class LargePictures:
    """Decode a large picture whole and in strips."""

    # A published configuration by its name, such as base, or a Python file that defines get_config().
    config: str = "base"
    # Height and width of the picture, px.
    size: int = 1024
    settings: Settings


def work(options: LargePictures) -> int:
    """Returns the exit code: 0, or 1 if one of them failed."""
    config = dataclasses.replace(options.settings.model, dtype="float32")
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(directory) / "model")
        save_model(model, Autoencoder(config, rngs=nnx.Rngs(0)))
        # Not handed over as arrays: both processes make them, and hold no copy that would be counted.
        shared = {"model": model, "size": options.size}
        results = contest.hold(
            [contest.Contender("whole", at_once, shared), contest.Contender("in strips", in_strips, shared)],
            rounds=0,
            warm_up=0,
        )
    print(f"\ndecode of one picture, {options.config}, {options.size} x {options.size} px, float32")
    print(contest.machine())
    print(f"they differ by at most {contest.difference(results)}\n")
    print("| | start | memory of the process |\n| --- | --- | --- |")
    for r in results:
        print(f"| {r.name} | {r.failure or f'{r.start:.1f} s'} | {r.memory / 2**30:.2f} GiB |")
    return int(any(result.failure for result in results))


def at_once(model: str, size: int) -> contest.Run:
    """The decode as one program."""
    autoencoder = load_model(model)
    inputs = _inputs(autoencoder, size)

    def run() -> Callable[[], np.ndarray]:
        with patch.object(whole, "decode_program", _Reported(whole.decode_program, "whole")):
            y = jax.block_until_ready(inference.decode(autoencoder, *inputs))
        return lambda: np.asarray(y)

    return run


def in_strips(model: str, size: int) -> contest.Run:
    """The decode layer by layer in strips of rows."""
    autoencoder = load_model(model)
    inputs = _inputs(autoencoder, size)

    def run() -> Callable[[], np.ndarray]:
        with (
            patch.object(strips, "strip_program", _Reported(strips.strip_program, "a strip")),
            patch.object(strips, "latent_program", _Reported(strips.latent_program, "the latent's part")),
        ):
            y = strips.decode_in_strips(autoencoder, *inputs)
        return lambda: y

    return run


def _inputs(model: Autoencoder, size: int) -> list[np.ndarray]:
    arrays = subjects.pictures(model.config, 1, size)
    return [arrays[name] for name in ("latent", "image", "mask")]


class _Reported:
    """A jitted function that prints the most device memory that one of its programs needs, whenever that grows."""

    def __init__(self, function: Callable, name: str) -> None:
        self.function, self.name, self.most = function, name, 0
        self.seen: set[str] = set()

    def __call__(self, *arguments: object, **options: object) -> object:
        shapes = [x.kernel.shape if isinstance(x, Conv) else getattr(x, "shape", None) for x in arguments]
        if (key := f"{shapes} {options}") not in self.seen:
            self.seen.add(key)
            memory = self.function.lower(*arguments, **options).compile().memory_analysis()
            size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            if size > self.most:
                self.most = size
                print(f"device memory for {self.name}: {size / 2**30:.2f} GiB", flush=True)
        return self.function(*arguments, **options)


main = command("asymvq benchmark large_pictures", LargePictures, work)
