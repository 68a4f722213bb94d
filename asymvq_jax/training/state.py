"""The training state: what the step reads and writes, how it begins, and where each part of it lies."""

from __future__ import annotations

import dataclasses
import functools
import logging
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from asymvq_jax.config import Config, LossConfig, ModelConfig
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConfigError
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.discriminator import BatchStat, Discriminator
from asymvq_jax.models.growth import grow_decoder
from asymvq_jax.models.initialization import wavelet
from asymvq_jax.models.parameters import Params, seeded, split
from asymvq_jax.training.optimizer import autoencoder_optimizer, discriminator_optimizer

log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """Everything that a step changes, and the frozen parameters beside it; all dictionaries are by dotted name."""

    # Steps done, and the run's key, into which the step is folded.
    step: jax.Array
    key: jax.Array
    params: Params
    frozen: Params
    optimizer: optax.OptState
    # Moving average of `params`; empty where the run keeps none.
    ema: Params
    discriminator: Params
    batch_stats: Params
    discriminator_optimizer: optax.OptState


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """The static side of a run: module structures and optimizers; hashable, so that jit caches by it."""

    config: Config
    autoencoder: nnx.GraphDef[Autoencoder]
    discriminator: nnx.GraphDef[Discriminator]
    lpips: nnx.GraphDef[LPIPS] | None
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation


def is_trained(config: Config, name: str) -> bool:
    """Whether a parameter of the autoencoder is trained: the decoder's or its field of tone's; all in a first stage."""
    return config.run.train_encoder or name.startswith("decoder.tone." if config.run.train_tone else "decoder.")


def make_blueprint(config: Config) -> Blueprint:
    """The networks' structure; allocates nothing."""
    autoencoder, params = structure(config.model)
    discriminator, *_ = _discriminator_structure(config.loss, config.model)
    lpips = None
    if config.loss.perceptual_weight:
        dtype = jnp.dtype(config.model.dtype)
        lpips, _ = split(nnx.eval_shape(lambda: LPIPS("vgg16", dtype=dtype, rngs=seeded(0))))
    trained = {name: value for name, value in params.items() if is_trained(config, name)}
    return Blueprint(
        config,
        autoencoder,
        discriminator,
        lpips,
        autoencoder_optimizer(config, trained),
        discriminator_optimizer(config),
    )


# Tracing the initialisers again for each of a run's questions takes longer than the answers.
@functools.lru_cache(maxsize=8)
def _discriminator_structure(
    loss: LossConfig, model: ModelConfig
) -> tuple[nnx.GraphDef[Discriminator], Params, Params]:
    """The graph definition, and the shapes of the parameters and of the batch statistics."""
    graphdef, params, stats = split(
        nnx.eval_shape(lambda: Discriminator(loss, model, rngs=seeded(0))), nnx.Param, BatchStat
    )
    return graphdef, params, stats


class Drawn(NamedTuple):
    """What is random in a state before the first step; all by dotted name."""

    params: Params
    discriminator: Params
    batch_stats: Params


def draw(config: Config) -> Drawn:
    """The networks' first parameters, from the config's seed alone."""
    key = jax.random.key(config.run.seed)
    _, params = split(Autoencoder(config.model, rngs=seeded(jax.random.fold_in(key, 0))))
    if config.run.initialization == "wavelet":
        params = wavelet(params, config.model, config.run.initial_log_variance)
    rngs = seeded(jax.random.fold_in(key, 1))
    _, discriminator, stats = split(Discriminator(config.loss, config.model, rngs=rngs), nnx.Param, BatchStat)
    return Drawn(params, discriminator, stats)


def init_state(blueprint: Blueprint, drawn: Drawn) -> TrainState:
    """The state before the first step."""
    config = blueprint.config
    trained = {name: value for name, value in drawn.params.items() if is_trained(config, name)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(config.run.seed), 2)),
        params=trained,
        frozen={name: value for name, value in drawn.params.items() if name not in trained},
        optimizer=blueprint.optimizer.init(trained),
        ema=jax.tree.map(jnp.copy, trained) if config.optimizer.ema_decay else {},
        discriminator=drawn.discriminator,
        batch_stats=drawn.batch_stats,
        discriminator_optimizer=blueprint.discriminator_optimizer.init(drawn.discriminator),
    )


def abstract_state(blueprint: Blueprint, mesh: Mesh) -> TrainState:
    """The state's shapes, types and shardings; allocates nothing."""
    config = blueprint.config
    _, params = structure(config.model)
    _, discriminator, stats = _discriminator_structure(config.loss, config.model)
    shapes = jax.eval_shape(partial(init_state, blueprint), Drawn(params, dict(discriminator), dict(stats)))
    state: TrainState = sharding.placed_shapes(shapes, mesh)
    return state


def create_state(blueprint: Blueprint, mesh: Mesh, initial: Params | None = None) -> TrainState:
    """The state before the first step, under its shardings.

    Args:
        blueprint: from `make_blueprint`.
        mesh: the device mesh.
        initial: parameters that replace the random ones (see `starting_parameters`).
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(blueprint, mesh))
    # Drawn one by one: as one program, which would not outlast this call, they take as long to compile as a step.
    drawn = draw(blueprint.config)
    params = drawn.params | {name: x for name, x in (initial or {}).items() if name in drawn.params}
    drawn = drawn._replace(params=params)
    places = Drawn({**shardings.params, **shardings.frozen}, dict(shardings.discriminator), dict(shardings.batch_stats))
    with jax.set_mesh(mesh):
        # Copies: the step donates the state's buffers, and the caller keeps its own (`place` may alias them).
        begin = jax.jit(partial(init_state, blueprint), out_shardings=shardings)
        state: TrainState = begin(jax.tree.map(place, drawn, places))
    return state


def place(x: jax.Array | np.ndarray, to: NamedSharding) -> jax.Array:
    """Puts an array that every process holds whole onto a sharding that may span the processes."""
    # Not device_put, which moves no local array to other processes' devices, and compares numpy arrays among them.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, to, lambda index: host[index])


def starting_parameters(config: Config, source: ModelConfig, params: Params) -> Params:
    """What a run takes over from the model checkpoint named by run.init_from.

    The encoder, the 1x1 convolutions and the codebook always; the decoder where its widths and depth agree (its
    condition branch too, if both have one), or grown to the config's with run.grow_decoder. The rest starts at random.

    Raises:
        ConfigError: the checkpoint's encoder or latent is not the one that the config describes, or its decoder cannot
            grow into the config's.
    """
    differing = [
        f"model.{name}={value!r} (there {getattr(source, name)!r})"
        for name, value in config.model.encoder_fields().items()
        if getattr(source, name) != value
    ]
    if differing:
        raise ConfigError(
            f"run.init_from={config.run.init_from!r} holds another encoder: {', '.join(differing)}; "
            "set these fields to the checkpoint's values, or name another one (asymvq_jax.convert reads them)"
        )
    sizes = ("decoder_channels", "decoder_blocks", "decoder_layers")
    decoder = all(getattr(source, name) == getattr(config.model, name) for name in sizes)
    taken: dict[str, Any] = {
        name: value
        for name, value in params.items()
        if not name.startswith("decoder.")
        or (decoder and (config.model.condition or not name.startswith("decoder.condition.")))
    }
    what = " and decoder" if decoder else f"; the decoder is new, its sizes differ from {source.decoder_channels}"
    if config.run.grow_decoder and not decoder:
        taken |= grow_decoder(source, params, config.model, config.run.seed)
        what = f" and decoder, grown from {source.decoder_channels}"
    log.info("from %s: encoder%s", config.run.init_from, what)
    return taken
