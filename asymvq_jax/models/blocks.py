"""Layers that the encoder and the decoder share: convolution, group normalisation, residual block, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from asymvq_jax.devices.sharding import activation_ways, constrain_activation, gather_kernel, gather_rows, height_ways
from asymvq_jax.models.convolution import convolve

# The reference's initialisation: uniform in ±1/sqrt(fan_in).
_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _uniform_bias(key: jax.Array, fan_in: int, outputs: int) -> jax.Array:
    return jax.random.uniform(key, (outputs,), jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


class Conv(nnx.Module):
    """2-D convolution on NHWC, zero padding; float32 kernel and bias, computed in `dtype`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bias: bool = True,
        kernel_init: nnx.Initializer = _uniform,
        before: tuple[int, ...] = (),
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        # `before` height and width, a kernel of more dimensions may have others.
        window = (*before, size, size)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*window, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(_uniform_bias(rngs.params(), math.prod(window) * inputs, outputs)) if bias else None
        self.stride = stride
        self.padding = padding or (size // 2, size // 2)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, inputs) -> (b, h', w', outputs)."""
        return self.apply(x)

    def apply(
        self, x: jax.Array, *, kernel: jax.Array | None = None, row_padding: tuple[int, int] | None = None
    ) -> jax.Array:
        """The convolution with another kernel (for gradients with respect to it) or other padding of the rows."""
        kernel = self.kernel[...] if kernel is None else kernel
        return self._add_bias(self._convolve(x, kernel, (row_padding or self.padding, self.padding)))

    def _convolve(self, x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
        return convolve(
            x.astype(self.dtype), gather_kernel(kernel.astype(self.dtype)), stride=self.stride, padding=padding
        )

    def _add_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None, None]


class UpsampleConv(Conv):
    """Nearest doubling, then a 3x3 convolution, without ever making the doubled map.

    Of the nine pixels under the kernel some are copies of one another: an even row of the output sees two rows of the
    input, the upper one under the kernel's first row and the lower one under the other two; an odd row likewise. So
    each of the four parities of (row, column) is a 2x2 convolution of the small map, with sums of the kernel's
    elements: 16 products instead of 36.
    """

    def __init__(self, channels: int, outputs: int | None = None, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(channels, outputs or channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, channels) -> (b, 2h, 2w, outputs), which are as many by default."""
        zero = jnp.zeros((), self.dtype)
        parts = []
        for row, rows in enumerate(_merge(self.kernel[...], 0)):
            for column, kernel in enumerate(_merge(rows, 1)):
                y = self._convolve(x, kernel, ((1 - row, row), (1 - column, column)))
                # Interleaved by padding and adding: stacking and reshaping takes libtpu a quarter more cycles.
                parts.append(jax.lax.pad(y, zero, ((0, 0, 0), (row, 1 - row, 1), (column, 1 - column, 1), (0, 0, 0))))
        return self._add_bias(sum(parts[1:], parts[0]))


def _merge(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """Three rows (axis 0) or columns (1) of a kernel to two: for the even and for the odd ones of a doubled map."""
    first, middle, last = jnp.moveaxis(kernel, axis, 0)
    return [jnp.stack([first, middle + last], axis), jnp.stack([first + middle, last], axis)]


class GroupNorm(nnx.Module):
    """Group normalisation with an optional SiLU; statistics and the affine map in float32."""

    def __init__(
        self, channels: int, groups: int, *, silu: bool = True, epsilon: float = 1e-6, dtype: DTypeLike
    ) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups = groups
        self.silu = silu
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, h, w, c)."""
        return self.normalize(x, channel_moments(x))

    def normalize(self, x: jax.Array, moments: jax.Array) -> jax.Array:
        """The same with the `channel_moments` of a whole of which `x` may be a part."""
        b, _, _, c = x.shape
        mean, square = moments.reshape(2, b, self.groups, c // self.groups).mean(-1)
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon)
        mean, inverse = (jnp.repeat(s, c // self.groups, axis=-1) for s in (mean, inverse))
        scale = inverse * self.scale[...][None]
        shift = self.bias[...][None] - mean * scale
        y = x.astype(jnp.float32) * scale[:, None, None] + shift[:, None, None]
        return (jax.nn.silu(y) if self.silu else y).astype(self.dtype)


def channel_moments(x: jax.Array) -> jax.Array:
    """Means of the values and of their squares over height and width: (b, h, w, c) -> (2, b, c) float32.

    One pass over x, which is never reshaped; the groups' statistics follow from these few numbers.
    """
    x = x.astype(jnp.float32)
    return jnp.stack([jnp.mean(x, (1, 2)), jnp.mean(jnp.square(x), (1, 2))])


class Norm(Protocol):
    """A normalisation over channels, `GroupNorm` or another."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, h, w, c)."""

    def normalize(self, x: jax.Array, moments: jax.Array) -> jax.Array:
        """The same with the `channel_moments` of a whole of which `x` may be a part."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Makes the layers of one half as Stable Diffusion has them; `models.causal` makes those of other autoencoders."""

    groups: int
    dtype: DTypeLike

    def conv(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs) -> Conv:
        """A convolution of stride 1."""
        return Conv(inputs, outputs, size, dtype=self.dtype, rngs=rngs)

    def norm(self, channels: int) -> Norm:
        """A normalisation with SiLU."""
        return GroupNorm(channels, self.groups, dtype=self.dtype)

    def attention(self, channels: int, *, rngs: nnx.Rngs) -> Attention:
        """Self-attention over a picture's pixels."""
        return Attention(channels, self.groups, dtype=self.dtype, rngs=rngs)

    def upsampled(self, channels: int) -> int:
        """The channels that the decoder goes on with where it doubles the resolution."""
        return channels

    def over_time(self, level: int, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Conv | None:
        """The convolution over time between a level and the next coarser one, which a picture never meets."""
        return None


class ResBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, inputs: int, outputs: int, layers: Layers, *, rngs: nnx.Rngs) -> None:
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = layers.norm(outputs)
        self.conv2 = layers.conv(outputs, outputs, 3, rngs=rngs)
        self.shortcut = layers.conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, inputs) -> (b, h, w, outputs)."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        x = x if self.shortcut is None else self.shortcut(x)
        return constrain_activation(x + h)


# The scores of one chunk of queries may take so much on a device: 64 MiB are those of a whole 512 x 512 picture.
SCORE_BYTES = 256 * 2**20


class Attention(nnx.Module):
    """Single-head self-attention over all pixels, with a residual; softmax in float32.

    The scores of every pair of pixels would be 17 GB for a 2048 x 2048 picture, so a large picture's queries are taken
    in chunks, and a chunk's scores are computed again in the backward pass.
    """

    def __init__(self, channels: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm: Norm = GroupNorm(channels, groups, silu=False, dtype=dtype)
        self.query, self.key, self.value, self.out = (
            Conv(channels, channels, 1, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, h, w, c)."""
        b, h, w, c = x.shape
        query, key, value = (part.reshape(b, h * w, c) for part in self.project(self.norm(x)))
        # Each device attends from its own rows to those of all.
        key, value = gather_rows(key), gather_rows(value)
        chunks = _divisor_from(-(-4 * b * (h * w) ** 2 // (SCORE_BYTES * activation_ways())), h * w // height_ways())
        if chunks == 1:
            mixed = _attend(query, key, value)
        else:
            # A chunk has every chunks-th query, so that it is split over the devices as the whole is.
            parts = query.reshape(b, h * w // chunks, chunks, c).transpose(2, 0, 1, 3)
            attend = jax.checkpoint(lambda part: _attend(constrain_activation(part), key, value))
            mixed = jax.lax.map(attend, parts).transpose(1, 2, 0, 3)
        return constrain_activation(x + self.out(mixed.reshape(b, h, w, c)))

    def project(self, x: jax.Array) -> Sequence[jax.Array]:
        """Queries, keys and values, (b, h, w, c) each."""
        return self.query(x), self.key(x), self.value(x)


@jax.named_scope("attention")
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """(b, q, c), (b, k, c), (b, k, c) -> (b, q, c)."""
    scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(value.dtype)
    return jnp.einsum("bqk,bkc->bqc", weights, value)


def _divisor_from(least: int, number: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself."""
    return next((d for d in range(least, number) if number % d == 0), number)


class MidBlock(nnx.Module):
    """Residual block, attention (which some models lack), residual block, at the latent's resolution."""

    def __init__(self, channels: int, layers: Layers, *, attention: bool, remat: bool, rngs: nnx.Rngs) -> None:
        self.block1 = ResBlock(channels, channels, layers, rngs=rngs)
        self.attention = layers.attention(channels, rngs=rngs) if attention else None
        self.block2 = ResBlock(channels, channels, layers, rngs=rngs)
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> (b, h, w, c)."""
        for layer in (self.block1, self.attention, self.block2):
            if layer is not None:
                x = run_block(layer, x, remat=self.remat)
        return x


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: Layers,
        *,
        blocks: int,
        attention: bool,
        remat: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.blocks = nnx.List(
            [ResBlock(inputs if i == 0 else outputs, outputs, layers, rngs=rngs) for i in range(blocks)]
        )
        self.attentions = nnx.List([layers.attention(outputs, rngs=rngs) for _ in range(blocks if attention else 0)])
        self.remat = remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, inputs) -> (b, h, w, outputs)."""
        for layer in self.layers():
            x = run_block(layer, x, remat=self.remat)
        return x

    def layers(self) -> Iterator[ResBlock | Attention]:
        """Blocks and attentions in the order in which they run."""
        for i, block in enumerate(self.blocks):
            yield block
            if self.attentions:
                yield self.attentions[i]


def run_block(block: nnx.Module, x: jax.Array, *, remat: bool) -> Any:
    """Applies `block`; with `remat`, its activations are recomputed in the backward pass."""
    if not remat:
        return block(x)
    return nnx.remat(lambda module, value: module(value))(block, x)
