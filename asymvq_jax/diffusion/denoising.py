"""The denoising loop: a sampler's table and a network, from noise to latents, as one compiled program."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from asymvq_jax.devices import sharding
from asymvq_jax.diffusion.solvers import History, Row, Solver, advance, begin, replace_newest
from asymvq_jax.diffusion.unet import Added, UNet
from asymvq_jax.models.parameters import Params, jitted, merge, split


class Known(NamedTuple):
    """A picture that a run starts from or keeps, as a diffusion model scales latents."""

    # (b, h, w, c) float32.
    image: jax.Array
    # (b, h, w, 1) float32: 1 = generate, 0 = preserve; between them a pixel is preserved for as large a share of the
    # steps as is missing to 1 (differential diffusion, Levin and Fried 2023). None: nothing is preserved.
    mask: jax.Array | None = None


class Batch(NamedTuple):
    """What the loop takes for each picture."""

    # (b, h, w, c) float32 of variance 1.
    noise: jax.Array
    # (b, 2, n, d): the features of nothing, and those of the condition; or (b, 1, n, d) without guidance.
    context: jax.Array
    # (b, h, w, k), what the network sees beside the noisy latent.
    fixed: jax.Array | None = None
    known: Known | None = None
    # (b,) keys of the fresh noise, for a stochastic sampler.
    keys: jax.Array | None = None
    # XL's pooled text and sizes, with the axis of the ways of guidance second.
    added: Added | None = None


@partial(jitted, static_argnames="mesh")
def denoise(unet: UNet, solver: Solver, guidance: jax.Array, batch: Batch, *, mesh: Mesh | None = None) -> jax.Array:
    """The whole loop of a sampler.

    Args:
        unet: the network.
        solver: the sampler's table.
        guidance: by how much the condition's prediction is exaggerated over that of nothing.
        batch: the pictures' inputs.
        mesh: splits the batch; each device has the whole network and needs nothing from the others.

    Returns:
        (b, h, w, c) float32, as a diffusion model scales latents.
    """
    graphdef, params = split(unet)

    def loop(params: Params, solver: Solver, guidance: jax.Array, batch: Batch) -> jax.Array:
        predict = merge(graphdef, params)
        count, ways = batch.context.shape[:2]
        context = batch.context.reshape(count * ways, *batch.context.shape[2:])
        added = jax.tree.map(lambda x: x.reshape(count * ways, -1), batch.added)
        steps = len(solver.rows.timesteps)

        def step(history: History, at: tuple[Row, jax.Array]) -> tuple[History, None]:
            row, i = at
            x = history.samples[0]
            x = x if batch.fixed is None else jnp.concatenate([x, batch.fixed], -1)
            output = predict(jnp.repeat(x, ways, 0), jnp.full(count * ways, row.timesteps), context, added)
            output = output.reshape(count, ways, *output.shape[1:])
            if ways == 2:
                output = output[:, :1] + guidance * (output[:, 1:] - output[:, :1])
            noise = None if batch.keys is None else fresh_noise(batch.keys, i, batch.noise.shape[1:])
            history = advance(row, history, output[:, 0], noise)
            if batch.known is not None and batch.known.mask is not None:
                history = _preserve(history, row, batch.known.image, batch.noise, batch.known.mask, (i + 1) / steps)
            return history, None

        first = begin(solver, batch.noise, None if batch.known is None else batch.known.image)
        history, _ = jax.lax.scan(step, first, (solver.rows, jnp.arange(steps)))
        return history.samples[0]

    if mesh is not None:
        # Not left to XLA, which cannot split the attention's kernels.
        whole, part = PartitionSpec(), PartitionSpec(sharding.BATCH_AXES)
        places = (whole, whole, whole, part)
        loop = jax.shard_map(loop, mesh=mesh, in_specs=places, out_specs=part, check_vma=False)
    return loop(params, solver, guidance, batch)


def fresh_noise(keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """What a stochastic sampler adds after a step: (b,) keys -> (b, *shape) float32 of variance 1."""
    # Zero would not do: the first noise is the key's own.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step + 1), shape))(keys)


def _preserve(
    history: History, row: Row, image: jax.Array, noise: jax.Array, mask: jax.Array, share: jax.Array
) -> History:
    """The newest sample with the known image, as noisy as it is, where a share of the steps has not freed it yet."""
    known = row.levels[0] * image + row.levels[1] * noise
    preserved = (1 - mask > share) | (mask == 0)
    return replace_newest(history, jnp.where(preserved, known, history.samples[0]))
