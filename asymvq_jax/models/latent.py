"""How a diffusion model sees the latent: scaled and shifted, or normalised by channel, and in patches."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError


class Normalization(NamedTuple):
    """A diffusion model sees (patches of the latent - mean) * scale; both are numbers, or (1, 1, 1, channels)."""

    mean: jax.Array | float
    scale: jax.Array | float
    # Pixels of the latent, along each side, that are channels of one: in the order (channel, row, column).
    patch: int = 1

    def apply(self, z: jax.Array) -> jax.Array:
        """(b, h, w, c) as `encode` gives it -> (b, h / patch, w / patch, c * patch**2).

        Raises:
            InputError: h or w is not a multiple of the patch.
        """
        b, h, w, c = z.shape
        p = self.patch
        if h % p or w % p:
            raise InputError(f"the latent has {h} rows and {w} columns: expected multiples of {p}, the model's patch")
        if p > 1:
            z = z.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // p, w // p, c * p * p)
        return (z - self.mean) * self.scale

    def remove(self, x: jax.Array) -> jax.Array:
        """The inverse of `apply`."""
        x = x / self.scale + self.mean
        b, h, w, c = x.shape
        p = self.patch
        if p == 1:
            return x
        return x.reshape(b, h, w, c // p**2, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(b, h * p, w * p, c // p**2)


class Statistics(nnx.Module):
    """Mean and variance of each channel of the latent's patches, as a batch normalisation gathered them."""

    def __init__(self, channels: int) -> None:
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((channels,), jnp.float32))
        # Of the batches that they were gathered from; nothing depends on it.
        self.count = nnx.Param(jnp.zeros((), jnp.float32))


def normalization(config: ModelConfig, statistics: Statistics | None = None) -> Normalization:
    """The normalisation of a model's latents.

    Args:
        config: the model's.
        statistics: the model's, if it has some.

    Raises:
        InputError: the model has statistics among its weights, and they are not given.
    """
    if config.batch_norm_epsilon:
        if statistics is None:
            raise InputError("these latents are normalised by statistics among the model's weights: give the model")
        inverse = jax.lax.rsqrt(statistics.variance[...] + config.batch_norm_epsilon)
        return Normalization(_by_channel(statistics.mean[...]), _by_channel(inverse), config.latent_patch)
    if config.latent_std:
        scale = np.float32(config.scaling_factor) / np.asarray(config.latent_std, np.float32)
        mean = np.asarray(config.latent_mean, np.float32)
        return Normalization(_by_channel(mean), _by_channel(scale), config.latent_patch)
    return Normalization(config.shift_factor, config.scaling_factor, config.latent_patch)


def _by_channel(values: jax.Array | np.ndarray) -> jax.Array:
    """(c,) -> (1, 1, 1, c)."""
    return jnp.asarray(values)[None, None, None]
