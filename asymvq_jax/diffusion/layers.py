"""Layers that the UNet and CLIP share: linear, layer normalisation, attention of several heads, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# The scores of one chunk of queries may take so much on a device.
SCORE_BYTES = 2**30
# cuDNN's fused attention takes half precision and heads of at most so many channels, in multiples of eight.
FUSED_HEAD = 128

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
}


def linear(inputs: int, outputs: int, *, bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer, float32 kernel (inputs, outputs), computed in `dtype`."""
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; statistics and the affine map in float32."""

    def __init__(self, channels: int, *, epsilon: float = 1e-5, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., channels) -> (..., channels)."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (x * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(self.dtype)


class MultiHeadAttention(nnx.Module):
    """Attention from one sequence to itself or to another; softmax in float32."""

    def __init__(
        self, channels: int, context: int, heads: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.query = linear(channels, channels, bias=bias, dtype=dtype, rngs=rngs)
        self.key = linear(context, channels, bias=bias, dtype=dtype, rngs=rngs)
        self.value = linear(context, channels, bias=bias, dtype=dtype, rngs=rngs)
        self.out = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array | None = None, *, causal: bool = False) -> jax.Array:
        """(b, n, channels), (b, m, context) -> (b, n, channels); without a context, to itself."""
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.query(x), self.key(context), self.value(context))
        )
        return self.out(attend(query, key, value, causal=causal).reshape(x.shape))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False) -> jax.Array:
    """Softmax attention, (b, n, heads, d), (b, m, heads, d), (b, m, heads, d) -> (b, n, heads, d).

    cuDNN's fused kernel on a GPU where it can; else XLA's, in chunks of queries where the scores are large.
    """
    b, n, heads, d = query.shape
    if jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16 and d <= FUSED_HEAD and d % 8 == 0:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
    scores = 4 * b * heads * n * key.shape[1]
    chunks = math.gcd(n, 2 ** math.ceil(math.log2(max(1, scores / SCORE_BYTES))))
    if chunks == 1 or causal:
        return _attend(query, key, value, causal=causal)
    parts = query.reshape(b, chunks, n // chunks, heads, d).swapaxes(0, 1)
    mixed = jax.lax.map(lambda part: _attend(part, key, value, causal=False), parts)
    return mixed.swapaxes(0, 1).reshape(query.shape)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool) -> jax.Array:
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores).astype(value.dtype), value)


class FeedForward(nnx.Module):
    """Two linear layers with an activation between them, gated (GEGLU) or not."""

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.expand = linear(channels, inner * (2 if gated else 1), dtype=dtype, rngs=rngs)
        self.contract = linear(inner, channels, dtype=dtype, rngs=rngs)
        self.activation = activation
        self.gated = gated

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., channels) -> (..., channels)."""
        x, activate = self.expand(x), ACTIVATIONS[self.activation]
        if self.gated:
            x, gate = jnp.split(x, 2, -1)
            return self.contract(x * activate(gate))
        return self.contract(activate(x))
