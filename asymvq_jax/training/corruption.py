"""What diffusion models do to a fill's tone, done to pictures under their masks, so that the decoder learns to undo it.

A fill comes back from the diffusion model with a tone that drifted as a whole or across its width, a little blurred or
with the wrong grain (ASUKA, arXiv 2312.04831; PixPerfect, arXiv 2512.03247). The encoder sees the picture so corrupted;
condition branch and target stay clean.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from asymvq_jax.config import HarmoniseConfig


def corrupt(image: jax.Array, mask: jax.Array, key: jax.Array, config: HarmoniseConfig) -> jax.Array:
    """The picture as it would come back from an editor: another tone, blur and grain under the mask.

    Args:
        image: (b, h, w, 3) float32 in [-1, 1].
        mask: (b, h, w, 1) in [0, 1], 1 = generate. A sample whose mask is all ones stays: nothing is left there that
            shows the right tone.
        key: decides everything, together with the sample's place in the batch.
        config: how often and how much.

    Returns:
        (b, h, w, 3) float32 in [-1, 1].
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
    return jax.vmap(lambda x, m, k: _corrupt_one(x, m, k, config))(image, mask, keys)


# How far inside the mask's edge an insertion ends, px: one of these.
MARGINS = (2, 4, 8)


def insert(image: jax.Array, mask: jax.Array, key: jax.Array, config: HarmoniseConfig) -> jax.Array:
    """The pictures with the content of the batch's next one under the mask of some of them.

    Args:
        image: (b, h, w, 3).
        mask: (b, h, w, 1) in [0, 1], 1 = generate. A sample whose mask is all ones stays.
        key: decides everything, together with the sample's place in the batch.
        config: how often, well inside the mask and up to its edge.

    Returns:
        (b, h, w, 3); outside the masks the pictures are as they were.
    """

    def region(mask: jax.Array, key: jax.Array) -> jax.Array:
        kind, margin = jax.random.split(key)
        drawn, number = jax.random.uniform(kind), jax.random.randint(margin, (), 0, len(MARGINS))
        inner = [_extreme(mask, 2 * m + 1, jax.lax.min, jnp.inf) for m in MARGINS]
        inner_region = jnp.select([number == i for i in range(len(MARGINS))], inner)
        flush = jnp.where(drawn < config.insert + config.insert_flush, mask, 0.0)
        return jnp.where(mask.min() < 1, jnp.where(drawn < config.insert, inner_region, flush), 0.0)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
    return image + jax.vmap(region)(mask, keys) * (jnp.roll(image, -1, axis=0) - image)


def _corrupt_one(image: jax.Array, mask: jax.Array, key: jax.Array, config: HarmoniseConfig) -> jax.Array:
    chosen, tone, grain, edge = jax.random.split(key, 4)
    fill = jnp.clip(_with_grain(_with_tone(image, tone, config), grain, config), -1, 1)
    share = _region(mask, edge, config.edge)
    wanted = jax.random.bernoulli(chosen, config.probability) & (mask < 1).any()
    return jnp.where(wanted, image + share * (fill - image), image)


def _with_tone(image: jax.Array, key: jax.Array, config: HarmoniseConfig) -> jax.Array:
    """An offset, a gain and a linear gradient, drawn for each channel; most of the offset is common to all of them."""
    h, w, channels = image.shape
    common, own, gain, slope = jax.random.split(key, 4)

    def draw(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

    offset = draw(common, (1,), config.offset) + draw(own, (channels,), config.offset / 2)
    factor = 1 + draw(gain, (channels,), config.gain)
    rows, columns = draw(slope, (2, channels), config.gradient)
    y = jnp.linspace(-1, 1, h)[:, None, None]
    x = jnp.linspace(-1, 1, w)[None, :, None]
    mean = image.mean((0, 1), keepdims=True)
    gradient = y * rows[None, None] + x * columns[None, None]
    moved: jax.Array = mean + factor[None, None] * (image - mean) + offset[None, None] + gradient
    return moved


def _with_grain(image: jax.Array, key: jax.Array, config: HarmoniseConfig) -> jax.Array:
    """Blurred or with added noise, each in one sample of three."""
    which, amount, noise = jax.random.split(key, 3)
    kind = jax.random.randint(which, (), 0, 3)
    level = jax.random.uniform(amount)
    blurred = blur(image, 0.3 + level * config.blur)
    noisy = image + level * config.noise * jax.random.normal(noise, image.shape)
    return jnp.where(kind == 1, blurred, jnp.where(kind == 2, noisy, image))


def _region(mask: jax.Array, key: jax.Array, edge: int) -> jax.Array:
    """The share of the corrupted picture, (h, w, 1): the mask, grown or shrunk by up to `edge` px, hard or soft."""
    which, soft = jax.random.split(key)
    size = 2 * edge + 1
    grown = _extreme(mask, size, jax.lax.max, -jnp.inf)
    shrunk = _extreme(mask, size, jax.lax.min, jnp.inf)
    kind = jax.random.randint(which, (), 0, 3)
    region = jnp.where(kind == 1, grown, jnp.where(kind == 2, shrunk, mask))
    return jnp.where(jax.random.bernoulli(soft), blur(region, float(max(edge, 1))), region)


def _extreme(mask: jax.Array, size: int, function: Any, start: float) -> jax.Array:
    """The least or greatest value within a square of `size` px: (h, w, 1) -> the same; along each axis in turn."""
    for window in ((size, 1, 1), (1, size, 1)):
        mask = jax.lax.reduce_window(mask, start, function, window, (1, 1, 1), "SAME")
    return mask


# Taps on each side of the Gaussian; it is cut off there.
RADIUS = 6


def blur(image: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """A separable Gaussian, (h, w, c) -> (h, w, c); the border is repeated."""
    offsets = jnp.arange(-RADIUS, RADIUS + 1, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    for axis in (0, 1):
        length = image.shape[axis]
        padded = jnp.pad(image, [(RADIUS, RADIUS) if a == axis else (0, 0) for a in range(3)], mode="edge")
        slices = (jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(len(offsets)))
        image = sum((w * s for w, s in zip(weights, slices, strict=True)), jnp.zeros_like(image))
    return image


def halo(mask: jax.Array, width: int) -> jax.Array:
    """The band within `width` px of the mask's edge, on both sides: (b, h, w, 1) of 0 and 1."""
    size = 2 * width + 1
    near = jax.vmap(lambda m: _extreme(m, size, jax.lax.max, -jnp.inf) - _extreme(m, size, jax.lax.min, jnp.inf))(mask)
    return (near > 0).astype(jnp.float32)
