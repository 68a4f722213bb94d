"""One training step: a pure function of (state, batch).

The reference runs the networks' forward passes twice a step, once for each optimizer. Here they run once, and both
updates come from them; the decoder's backward pass runs once as well, from the weighted sum of the two losses'
cotangents at the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from asymvq_jax.config import Config
from asymvq_jax.devices.sharding import constrain_activation, replicated
from asymvq_jax.files.images import to_float
from asymvq_jax.losses.adversarial import adaptive_weight, discriminator_hinge, generator_term
from asymvq_jax.losses.reconstruction import reconstruction_loss
from asymvq_jax.models.codebook import Quantized, usage
from asymvq_jax.models.discriminator import MOMENTUM, BatchStat
from asymvq_jax.models.parameters import Params, merge, state_of
from asymvq_jax.training.corruption import corrupt, halo, insert
from asymvq_jax.training.state import Blueprint, TrainState

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]

LAST_KERNEL = "decoder.conv_out.kernel"
# Folded into a step's key for the corruption of what the encoder sees, and for what is inserted.
CORRUPTION = 1
INSERTION = 2
# Among a micro-batch's metrics: an array of which, once averaged over the batch, two metrics are made.
CODE_SHARES = "code_shares"


class Gradients(NamedTuple):
    """What one micro-batch yields; the discriminator's are empty before it starts."""

    params: Params
    discriminator: Params


def train_step(
    state: TrainState, perceptual: Params, batch: Batch, *, blueprint: Blueprint, adversarial: bool
) -> tuple[TrainState, Metrics]:
    """Updates the decoder (in a first stage the whole autoencoder) and, once it has started, the discriminator.

    Args:
        state: the training state.
        perceptual: LPIPS's parameters; empty where loss.perceptual_weight is 0.
        batch: "image" (b, h, w, 3) and "mask" (b, h, w, 1), uint8 in [0, 255] and {0, 1}.
        blueprint: the static side of the run.
        adversarial: whether the discriminator has started (step >= loss.gan_start).

    Returns:
        The next state, and scalar float32 metrics.
    """
    config = blueprint.config
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    image, mask = to_float(batch["image"]), batch["mask"].astype(jnp.float32)

    gradients = partial(_gradients, blueprint, state, perceptual, adversarial=adversarial)
    count = config.optimizer.accumulate
    if count == 1:
        grads, stats, metrics = gradients(state.batch_stats, image, mask, key)
    else:
        grads, stats, metrics = _accumulate(gradients, state.batch_stats, image, mask, key, count)
    if config.model.codebook_size:
        metrics |= usage(metrics.pop(CODE_SHARES))

    updates, optimizer = blueprint.optimizer.update(grads.params, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= _norms("", grads.params, updates, params)
    # Where no average is kept, it is empty.
    ema = optax.incremental_update(params, state.ema, 1 - config.optimizer.ema_decay) if state.ema else {}
    state = state._replace(step=state.step + 1, params=params, optimizer=optimizer, ema=ema, batch_stats=stats)
    if adversarial:
        updates, optimizer = blueprint.discriminator_optimizer.update(
            grads.discriminator, state.discriminator_optimizer, state.discriminator
        )
        params = optax.apply_updates(state.discriminator, updates)
        metrics |= _norms("discriminator_", grads.discriminator, updates, params)
        state = state._replace(discriminator=params, discriminator_optimizer=optimizer)
    return state, metrics


def compiled_step(blueprint: Blueprint, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step` under jit: (state, perceptual, batch, *, adversarial).

    Args:
        blueprint: the static side of the run.
        state: the state, or its shapes, with the places that it keeps; each call takes over the memory of its state.
        mesh: the device mesh, on which the metrics are replicated.
    """
    return jax.jit(
        partial(train_step, blueprint=blueprint),
        static_argnames="adversarial",
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )


def _accumulate(
    gradients: partial[Any], stats: Params, image: jax.Array, mask: jax.Array, key: jax.Array, count: int
) -> tuple[Gradients, Params, Metrics]:
    """Means over `count` micro-batches; each takes every count-th sample, so that no sample changes its device."""

    def micro(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(stats: Params, slices: tuple[jax.Array, ...]) -> tuple[Params, tuple[Gradients, Metrics]]:
        image, mask, index = slices
        grads, stats, metrics = gradients(
            stats, constrain_activation(image), constrain_activation(mask), jax.random.fold_in(key, index)
        )
        return stats, (grads, metrics)

    def summed(carry: tuple[Any, Params], slices: tuple[jax.Array, ...]) -> tuple[tuple[Any, Params], None]:
        total, stats = carry
        stats, result = body(stats, slices)
        return (jax.tree.map(jnp.add, total, result), stats), None

    slices = (micro(image), micro(mask), jnp.arange(count))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(lambda: body(stats, jax.tree.map(lambda x: x[0], slices)))[1],
    )
    (total, stats), _ = jax.lax.scan(summed, (zeros, stats), slices)
    grads, metrics = jax.tree.map(lambda x: x / count, total)
    return grads, stats, metrics


def _gradients(
    blueprint: Blueprint,
    state: TrainState,
    perceptual: Params,
    stats: Params,
    image: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    adversarial: bool,
) -> tuple[Gradients, Params, Metrics]:
    """Losses and gradients of one micro-batch: image (b, h, w, 3) in [-1, 1], mask (b, h, w, 1)."""
    config, harmonise = blueprint.config, blueprint.config.harmonise
    if harmonise.insert or harmonise.insert_flush:
        image = insert(image, mask, jax.random.fold_in(key, INSERTION), harmonise)
    # A key of its own, so that the posterior's sample is that of a training without corruption.
    seen = corrupt(image, mask, jax.random.fold_in(key, CORRUPTION), harmonise) if harmonise.probability else image

    def reconstruct(params: Params) -> tuple[tuple[jax.Array, Metrics], tuple[jax.Array, Metrics]]:
        model = merge(blueprint.autoencoder, {**state.frozen, **params})
        if config.run.train_tone:
            return (model.decoder.toned(seen, image, mask), {}), (seen, {})
        with jax.named_scope("encoder"):
            latent = model.encode(seen)
        condition = (image, mask) if config.model.condition else (None, None)
        with jax.named_scope("decoder"):
            features = model.decode_features(latent.sample(key), *condition)
            recon = model.decoder.to_image(features)
        codes = latent.codes if isinstance(latent, Quantized) else None
        shares = {} if model.codebook is None or codes is None else {CODE_SHARES: model.codebook.shares(codes)}
        recon = model.decoder.toned(recon, *condition)
        return (recon, latent.penalties()), (features, shares)

    (recon, penalties), pull_params, (features, shares) = jax.vjp(reconstruct, state.params, has_aux=True)
    weights = _penalty_weights(config, math.prod(image.shape[1:]))

    lpips = None if blueprint.lpips is None else merge(blueprint.lpips, perceptual)
    (nll, parts), cotangent = jax.value_and_grad(reconstruction_loss, has_aux=True)(
        recon,
        image,
        lpips,
        config.loss.perceptual_weight,
        config.loss.reduction,
        config.loss.squared_weight,
        emphasis=1 + harmonise.halo_weight * halo(mask, harmonise.halo_width) if harmonise.halo_weight else None,
        pasted=mask if harmonise.composite else None,
    )
    penalty = sum(weights[name] * value for name, value in penalties.items())
    metrics = {"nll": nll, "loss": nll + penalty, **parts, **penalties, **shares}
    discriminator: Params = {}
    last: Params = {}
    if adversarial:
        pull_kernel = _last_layer(blueprint, state, features)
        discriminator, stats, gan_cotangent, gan_metrics = _adversarial(blueprint, state, stats, image, recon)
        at_nll, at_gan = pull_kernel(cotangent), pull_kernel(gan_cotangent)
        weight = config.loss.gan_weight * adaptive_weight(at_nll, at_gan)
        cotangent = cotangent + weight * gan_cotangent
        # So the backward pass need not compute it a third time.
        last = {LAST_KERNEL: at_nll + weight * at_gan}
        metrics |= gan_metrics
        metrics |= {"adaptive_weight": weight, "loss": metrics["loss"] + weight * gan_metrics["generator"]}

    pulled = {name: jnp.asarray(weights[name], value.dtype) for name, value in penalties.items()}
    (params,) = pull_params((cotangent, pulled))
    return Gradients({**params, **last}, discriminator), stats, metrics


def _penalty_weights(config: Config, elements: int) -> dict[str, float]:
    """The weights of a latent's penalties; none where its encoder is frozen."""
    c = config.loss
    if not config.run.train_encoder:
        return dict.fromkeys(("kl", "codebook", "commitment"), 0.0)
    factor = elements if c.reduction == "sum" else 1
    return {
        "kl": c.kl_weight * factor / elements,
        "codebook": c.codebook_weight * factor,
        "commitment": c.commitment_weight * factor,
    }


def _last_layer(blueprint: Blueprint, state: TrainState, features: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The map from a cotangent at the image to the gradient of the last convolution's kernel."""

    def to_image(kernel: jax.Array) -> jax.Array:
        model = merge(blueprint.autoencoder, {**state.frozen, **state.params})
        with jax.named_scope("last_layer"):
            return model.decoder.to_image(features, kernel)

    _, pull = jax.vjp(to_image, state.params[LAST_KERNEL])

    def at_kernel(cotangent: jax.Array) -> jax.Array:
        (gradient,) = pull(cotangent)
        return jnp.asarray(gradient)

    return at_kernel


def _adversarial(
    blueprint: Blueprint, state: TrainState, stats: Params, image: jax.Array, recon: jax.Array
) -> tuple[Params, Params, jax.Array, Metrics]:
    """The discriminator's gradients, its batch statistics, and the generator term's cotangent at the image.

    The logits of the reconstruction are computed once and serve both sides.
    """

    def judge(params: Params, picture: jax.Array) -> tuple[jax.Array, Params]:
        """The logits, and what the picture adds to the running statistics."""
        model = merge(blueprint.discriminator, {**params, **jax.tree.map(jnp.zeros_like, stats)})
        with jax.named_scope("discriminator"):
            return model(picture), state_of(model, BatchStat)

    fake, pull_fake, of_fake = jax.vjp(judge, state.discriminator, recon, has_aux=True)
    real, pull_real, of_real = jax.vjp(partial(judge, picture=image), state.discriminator, has_aux=True)
    moved = stats
    # As in the reference, the running statistics see the reconstruction twice: before and after the real picture.
    for seen in (of_fake, of_real, of_fake):
        moved = jax.tree.map(lambda old, new: (1 - MOMENTUM) * old + new, moved, seen)

    generator, at_fake = jax.value_and_grad(generator_term)(fake)
    hinge, (at_real_d, at_fake_d) = jax.value_and_grad(discriminator_hinge, argnums=(0, 1))(real, fake)
    _, gan_cotangent = pull_fake(at_fake)
    grads = jax.tree.map(jnp.add, pull_real(at_real_d)[0], pull_fake(at_fake_d)[0])
    metrics = {
        "generator": generator,
        "discriminator": hinge,
        "logits_real": jnp.mean(real),
        "logits_fake": jnp.mean(fake),
    }
    return grads, moved, gan_cotangent, metrics


def _norms(prefix: str, grads: Params, updates: Params, params: Params) -> Metrics:
    trees = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
    return {prefix + name: optax.tree.norm(tree) for name, tree in trees.items()}


def eval_step(
    params: Params, perceptual: Params, batch: Batch, *, blueprint: Blueprint, pictures: int
) -> tuple[Metrics, jax.Array]:
    """Held-out losses at the latent's mode.

    Args:
        params: all of the autoencoder's parameters.
        perceptual: LPIPS's parameters.
        batch: as in `train_step`.
        blueprint: the static side of the run.
        pictures: how many reconstructions to return.

    Returns:
        Scalars "nll", "l1", "lpips" (where loss.perceptual_weight is not 0), and "preservation", the mean squared error
        over the preserved pixels on the [-1, 1] scale; and (pictures, h, w, 3) reconstructions.
    """
    config = blueprint.config
    image, mask = to_float(batch["image"]), batch["mask"].astype(jnp.float32)
    model = merge(blueprint.autoencoder, params)
    recon = model.decode(model.encode(image).mode(), *((image, mask) if config.model.condition else (None, None)))
    lpips = None if blueprint.lpips is None else merge(blueprint.lpips, perceptual)
    nll, parts = reconstruction_loss(
        recon, image, lpips, config.loss.perceptual_weight, config.loss.reduction, config.loss.squared_weight
    )
    keep = jnp.broadcast_to(1.0 - mask, image.shape)
    error = jnp.sum(keep * jnp.square(recon - image)) / jnp.maximum(jnp.sum(keep), 1.0)
    return {"nll": nll, **parts, "preservation": error}, recon[:pictures]


def compiled_evaluation(blueprint: Blueprint, mesh: Mesh, pictures: int) -> jax.stages.Wrapped:
    """`eval_step` under jit: (params, perceptual, batch); what it returns is on every device of `mesh`."""
    return jax.jit(partial(eval_step, blueprint=blueprint, pictures=pictures), out_shardings=replicated(mesh))
