"""Stable Diffusion's encoder: image to the moments of the latent's posterior."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.blocks import Conv, GroupNorm, MidBlock, ResBlock, run_block


class DownLevel(nnx.Module):
    """Residual blocks at one resolution and, but for the last level, a stride-2 convolution."""

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, *, downsample: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.blocks = nnx.List(
            [
                ResBlock(inputs if i == 0 else outputs, outputs, config.norm_groups, dtype=dtype, rngs=rngs)
                for i in range(config.encoder_blocks)
            ]
        )
        # One row and column of zeros at the bottom and the right only.
        self.downsample = (
            Conv(outputs, outputs, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs) if downsample else None
        )
        self.remat = config.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, inputs) -> (b, h/2, w/2, outputs), or (b, h, w, outputs) at the last level."""
        for block in self.blocks:
            x = run_block(block, x, remat=self.remat)
        return x if self.downsample is None else self.downsample(x)


class Encoder(nnx.Module):
    """(b, h, w, 3) in [-1, 1] -> (b, h/8, w/8, 2 * latent_channels) for four levels."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        channels, groups, dtype = config.encoder_channels, config.norm_groups, jnp.dtype(config.dtype)
        self.conv_in = Conv(config.image_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.levels = nnx.List(
            [
                DownLevel(
                    channels[max(i - 1, 0)],
                    outputs,
                    config,
                    downsample=i < len(channels) - 1,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i, outputs in enumerate(channels)
            ]
        )
        self.mid = MidBlock(channels[-1], groups, dtype=dtype, remat=config.remat, rngs=rngs)
        self.norm_out = GroupNorm(channels[-1], groups, dtype=dtype)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        x = self.conv_in(image)
        for level in self.levels:
            x = level(x)
        return self.head(x)

    def head(self, x: jax.Array) -> jax.Array:
        """What follows the levels: (b, h/8, w/8, channels) -> (b, h/8, w/8, 2 * latent_channels)."""
        return self.conv_out(self.norm_out(self.mid(x)))
