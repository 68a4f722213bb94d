"""Layers of video models' autoencoders (Wan, Qwen-Image), as one picture meets them: causal convolutions, RMS norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.blocks import Attention, Conv, Layers, Norm


class CausalConv(Conv):
    """A convolution over time, height and width whose kernel ends at the present frame.

    Before a picture, which is a first frame, there are zeros: it meets the kernel's last slice alone. The others are
    kept, so that the video model's autoencoder can be written back whole.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, frames: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(inputs, outputs, size, before=(frames,), dtype=dtype, rngs=rngs)

    def _convolve(self, x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
        return super()._convolve(x, kernel[-1], padding)


class RMSNorm(nnx.Module):
    """Each pixel's channels divided by their root mean square, with an optional SiLU; in float32."""

    def __init__(self, channels: int, *, silu: bool = True, dtype: DTypeLike) -> None:
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.silu = silu
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, h, w, c)."""
        x = x.astype(jnp.float32)
        # The smallest length is that of torch's normalize.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))
        y = x * inverse * (self.gamma[...] * x.shape[-1] ** 0.5)[None, None, None]
        return (jax.nn.silu(y) if self.silu else y).astype(self.dtype)

    def normalize(self, x: jax.Array, moments: jax.Array) -> jax.Array:
        """The same: a pixel needs no other's `moments`."""
        return self(x)


class FusedAttention(Attention):
    """Attention whose queries, keys and values come from one convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(channels, silu=False, dtype=dtype)
        self.qkv = Conv(channels, 3 * channels, 1, dtype=dtype, rngs=rngs)
        self.out = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array) -> Sequence[jax.Array]:
        """Queries, keys and values, (b, h, w, c) each."""
        return jnp.split(self.qkv(x), 3, axis=-1)


@dataclass(frozen=True, kw_only=True)
class CausalLayers(Layers):
    """Makes the layers of Wan's and Qwen-Image's autoencoders."""

    temporal_levels: tuple[int, ...]

    def conv(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs) -> Conv:
        """As many frames as pixels."""
        return CausalConv(inputs, outputs, size, frames=size, dtype=self.dtype, rngs=rngs)

    def norm(self, channels: int) -> Norm:
        return RMSNorm(channels, dtype=self.dtype)

    def attention(self, channels: int, *, rngs: nnx.Rngs) -> Attention:
        return FusedAttention(channels, dtype=self.dtype, rngs=rngs)

    def upsampled(self, channels: int) -> int:
        return channels // 2

    def over_time(self, level: int, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Conv | None:
        if level not in self.temporal_levels:
            return None
        return CausalConv(inputs, outputs, 1, frames=3, dtype=self.dtype, rngs=rngs)


def layers_of(kind: str, config: ModelConfig) -> Layers:
    """What makes the layers of a half of this kind (`config.encoder_layers` or `config.decoder_layers`)."""
    groups, dtype = config.norm_groups, jnp.dtype(config.dtype)
    if kind == "sd":
        return Layers(groups=groups, dtype=dtype)
    return CausalLayers(groups=groups, dtype=dtype, temporal_levels=config.temporal_levels)
