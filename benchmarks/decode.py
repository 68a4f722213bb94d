"""Times the decode beside diffusers': asymvq benchmark decode."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from asymvq_jax.commands.entry import command
from asymvq_jax.config import ModelConfig, load_config
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.checkpoints import load_model
from asymvq_jax.models.parameters import jitted, merge
from benchmarks import contest, subjects


@dataclass(frozen=True, kw_only=True)
class Decode(contest.Options):
    """Time the decode beside diffusers'."""


def work(options: Decode) -> int:
    """Returns the exit code: 0, or 1 if a contender failed."""
    # Here, so that the rest of this module works without PyTorch.
    from benchmarks import peers

    config = load_config(options.config).model
    arrays = subjects.pictures(config, options.batch, options.size)
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = subjects.random_weights(config, Path(directory))
        shared = {"arrays": arrays, "dtype": options.dtype}
        torch_ways = {
            "PyTorch eager": {"channels_last": False, "compiled": False},
            "PyTorch eager, channels_last": {"channels_last": True, "compiled": False},
            "PyTorch compiled, channels_last": {"channels_last": True, "compiled": True},
        }
        results = contest.hold(
            [contest.Contender("ours", decode, {"model": ours, **shared})]
            + [
                contest.Contender(name, peers.decode, {"folder": theirs, **shared, **way})
                for name, way in torch_ways.items()
            ],
            options.rounds,
        )
    print(f"\ndecode, {options.config}, {options.batch} x {options.size} px, {options.dtype}")
    print(contest.machine())
    print(f"ours differs from PyTorch's by at most {contest.difference(results)}\n")
    print(contest.table(results, options.batch, flops(config, arrays)))
    return int(any(result.failure for result in results))


def decode(model: str, arrays: dict[str, np.ndarray], *, dtype: str) -> contest.Run:
    """Our decode of `arrays` with the weights in a checkpoint."""
    keep_compiled_programs()
    return decoding(load_model(model, dtype=dtype), arrays)


def decoding(autoencoder: Autoencoder, arrays: dict[str, np.ndarray]) -> contest.Run:
    """Our decode of `arrays`."""
    inputs = jax.device_put([arrays[name] for name in ("latent", "image", "mask")])
    step = jitted(lambda autoencoder, *inputs: autoencoder.decode(*inputs))

    def run() -> Callable[[], np.ndarray]:
        y = jax.block_until_ready(step(autoencoder, *inputs))
        return lambda: np.asarray(y)

    return run


def flops(config: ModelConfig, arrays: dict[str, np.ndarray]) -> float:
    """Of one decode, by its shapes."""
    graphdef, params = structure(config)
    inputs = [arrays[name] for name in ("latent", "image", "mask")]
    return matmul_flops(jax.make_jaxpr(lambda params, *x: merge(graphdef, params).decode(*x))(params, *inputs))


main = command("asymvq benchmark decode", Decode, work)
