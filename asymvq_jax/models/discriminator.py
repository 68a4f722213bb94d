"""PatchGAN (pix2pix, arXiv 1611.07004): judges overlapping patches as real or fake."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from asymvq_jax.config import LossConfig, ModelConfig
from asymvq_jax.models.blocks import Conv

# What a batch adds to the running statistics.
MOMENTUM = 0.1
_normal = nnx.initializers.normal(0.02)


class BatchStat(nnx.Variable[jax.Array]):
    """Running mean or variance of a batch normalisation."""


class BatchNorm(nnx.Module):
    """Batch normalisation (eps 1e-5) by the statistics of the global batch, computed in float32.

    The running statistics follow PyTorch (momentum 0.1, unbiased variance); they serve the exported weights, training
    never reads them.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(1.0 + _normal(rngs.params(), (channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = BatchStat(jnp.zeros((channels,), jnp.float32))
        self.variance = BatchStat(jnp.ones((channels,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(b, h, w, c) -> (b, h, w, c); moves the running statistics."""
        x = x.astype(jnp.float32)
        mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        count = x.size // x.shape[-1]
        stop = jax.lax.stop_gradient
        unbiased = stop(variance) * (count / max(count - 1, 1))
        self.mean[...] = (1 - MOMENTUM) * self.mean[...] + MOMENTUM * stop(mean)
        self.variance[...] = (1 - MOMENTUM) * self.variance[...] + MOMENTUM * unbiased
        scale = self.scale[...] * jax.lax.rsqrt(variance + 1e-5)
        return ((x - mean[None, None, None]) * scale[None, None, None] + self.bias[...][None, None, None]).astype(
            self.dtype
        )


class Discriminator(nnx.Module):
    """(b, h, w, 3) -> logits (b, about h/8 - 2, about w/8 - 2, 1), float32, for three layers."""

    def __init__(self, config: LossConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> None:
        layers, features, dtype = config.discriminator_layers, config.discriminator_features, jnp.dtype(model.dtype)
        widths = [model.image_channels] + [features * min(2**i, 8) for i in range(layers + 1)]
        self.convs = nnx.List(
            [
                Conv(
                    widths[i],
                    widths[i + 1],
                    4,
                    stride=2 if i < layers else 1,
                    padding=(1, 1),
                    # The normalisation that follows all but the first cancels a bias.
                    bias=i == 0,
                    kernel_init=_normal,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(layers + 1)
            ]
        )
        self.norms = nnx.List([BatchNorm(width, dtype=dtype, rngs=rngs) for width in widths[2:]])
        self.conv_out = Conv(widths[-1], 1, 4, padding=(1, 1), kernel_init=_normal, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b y x 1"]:
        x = jax.nn.leaky_relu(self.convs[0](image), 0.2)
        for conv, norm in zip(list(self.convs)[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x).astype(jnp.float32)
