"""Times the training step beside PyTorch's: asymvq benchmark train_step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, load_config
from asymvq_jax.devices import sharding
from asymvq_jax.devices.compilation import compiled, keep_compiled_programs
from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.files import images
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.checkpoints import load_parameters
from asymvq_jax.models.parameters import Params, split
from asymvq_jax.training.state import abstract_state, create_state, make_blueprint
from asymvq_jax.training.step import compiled_step
from benchmarks import contest, subjects


@dataclass(frozen=True, kw_only=True)
class TrainStep(contest.Options):
    """Time the training step beside PyTorch's."""

    # Height and width of the pictures, px.
    size: int = 128


def work(options: TrainStep) -> int:
    """Returns the exit code: 0, or 1 if a contender failed."""
    # Here, so that the rest of this module works without PyTorch.
    from benchmarks import peers

    config = load_config(options.config, [f"--model.dtype={options.dtype}"])
    arrays = subjects.pictures(config.model, options.batch, options.size)
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = subjects.random_weights(config.model, Path(directory))
        ways = {
            "PyTorch as published, eager": {"once": False, "compiled": False},
            "PyTorch as published, compiled": {"once": False, "compiled": True},
            "PyTorch, one forward pass, eager": {"once": True, "compiled": False},
            "PyTorch, one forward pass, compiled": {"once": True, "compiled": True},
        }
        shared = {"folder": theirs, "arrays": arrays, "dtype": options.dtype}
        results = contest.hold(
            [contest.Contender("ours", start, {"model": ours, "arrays": arrays, "config": config})]
            + [contest.Contender(name, peers.train, shared | way) for name, way in ways.items()],
            options.rounds,
        )
    print(f"\ntraining step, {options.config}, {options.batch} x {options.size} px, {options.dtype}")
    print(contest.machine())
    losses = ", ".join(f"{r.output[0]:.6g} ({r.name})" for r in results if r.output is not None)
    print(f"first reconstruction loss, each with its own noise in the latent: {losses}\n")
    print(contest.table(results, options.batch, flops(config, arrays)))
    return int(any(result.failure for result in results))


def start(model: str, arrays: dict[str, np.ndarray], config: Config) -> contest.Run:
    """Our training steps from the weights in a checkpoint."""
    keep_compiled_programs()
    return training(config, arrays, load_parameters(model)[1])


def training(config: Config, arrays: dict[str, np.ndarray], initial: Params | None = None) -> contest.Run:
    """Our training steps, the discriminator taking part; the result is the first reconstruction loss."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    blueprint = make_blueprint(config)
    state = create_state(blueprint, mesh, initial)
    _, perceptual = split(load_lpips("vgg16"))
    perceptual, batch = jax.device_put((perceptual, _batch(arrays)), sharding.replicated(mesh))
    first: list[np.ndarray] = []
    with jax.set_mesh(mesh):
        step = compiled(compiled_step(blueprint, state, mesh).trace(state, perceptual, batch, adversarial=True))

    def run() -> Callable[[], np.ndarray]:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(step(state, perceptual, batch))
        first.append(np.asarray(metrics["nll"])[None])
        return lambda: first[0]

    return run


def _batch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"image": images.to_uint8(arrays["image"]), "mask": arrays["mask"].astype(np.uint8)}


def flops(config: Config, arrays: dict[str, np.ndarray]) -> float:
    """Of our step, which runs every network once."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    blueprint = make_blueprint(config)
    state = abstract_state(blueprint, mesh)
    _, perceptual = split(load_lpips("vgg16"))
    step = compiled_step(blueprint, state, mesh)
    return matmul_flops(step.trace(state, perceptual, _batch(arrays), adversarial=True).jaxpr)


main = command("asymvq benchmark train_step", TrainStep, work)
