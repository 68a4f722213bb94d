"""Layers that the UNet and CLIP share: linear, layer normalisation, attention of several heads, feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.typing import DTypeLike

# So many bytes of scores are made at once: on a CPU what its cache holds, elsewhere what the device's memory spares.
CACHED_SCORES, SCORES = 2**23, 2**30
# Fused attention takes half precision and heads of at most so many channels: cuDNN's in multiples of eight, Pallas'
# with tokens in multiples of 128. From so many tokens on it pays on a TPU.
FUSED_HEAD, FLASH_MULTIPLE, FLASH_TOKENS = 128, 128, 1024

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

    Fused by cuDNN on a GPU, and on a TPU by Pallas from one long sequence to itself, where they can; else XLA's, which
    takes large attention in parts.
    """
    (b, n, heads, d), m = query.shape, key.shape[1]
    if m == 1:
        return jnp.broadcast_to(value, query.shape)
    fusible = query.dtype == jnp.bfloat16 and d <= FUSED_HEAD
    if fusible and d % 8 == 0 and _has_cudnn_attention():
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
    inputs = [x.swapaxes(1, 2) for x in (query, key, value)]
    if causal or 4 * b * heads * n * m <= CACHED_SCORES:
        mixed = _attend(*inputs, causal=causal)
    else:
        in_parts = partial(_attend_in_parts, scores=SCORES)
        flash = fusible and n == m and n % FLASH_MULTIPLE == 0 and n >= FLASH_TOKENS
        # By the platform that the program is for: a TPU's is planned on a CPU.
        mixed = jax.lax.platform_dependent(
            *inputs,
            cpu=partial(_attend_in_parts, scores=CACHED_SCORES),
            tpu=_flash if flash else in_parts,
            default=in_parts,
        )
    return mixed.swapaxes(1, 2)


@cache
def _has_cudnn_attention() -> bool:
    """Whether the devices are NVIDIA's, of Ampere's generation or a later one."""
    device = jax.local_devices()[0]
    return (
        device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
    )


def _flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`_attend` without the scores ever being in a TPU's main memory; (b, heads, n, d) each."""
    n, d = query.shape[-2:]
    block = math.gcd(n, 512)
    sizes = flash_attention.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
    mixed: jax.Array = flash_attention.flash_attention(query, key, value, sm_scale=d**-0.5, block_sizes=sizes)
    return mixed


def _attend_in_parts(query: jax.Array, key: jax.Array, value: jax.Array, *, scores: int) -> jax.Array:
    """`_attend`, head by head and in chunks of queries where there are more than `scores` bytes of scores.

    (b, heads, n, d), (b, heads, m, d), (b, heads, m, d) -> (b, heads, n, d).
    """
    (b, heads, n, d), m = query.shape, key.shape[2]
    if 4 * b * heads * n * m <= scores:
        return _attend(query, key, value)
    chunks = math.gcd(n, 2 ** math.ceil(math.log2(max(1, 4 * n * m / scores))))

    def one_head(inputs: list[jax.Array]) -> jax.Array:
        query, key, value = inputs
        mixed: jax.Array = jax.lax.map(lambda part: _attend(part, key, value), query.reshape(chunks, n // chunks, d))
        return mixed

    mixed: jax.Array = jax.lax.map(one_head, [x.reshape(b * heads, -1, d) for x in (query, key, value)])
    return mixed.reshape(query.shape)


@jax.named_scope("attention")
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False) -> jax.Array:
    """(..., n, d), (..., m, d), (..., m, d) -> (..., n, d)."""
    scores = jnp.einsum("...nd,...md->...nm", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(jnp.expand_dims(seen, range(scores.ndim - 2)), scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    mixed = jnp.einsum("...nm,...md->...nd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    # Divided last, where there is less to divide.
    return (mixed / jnp.sum(weights, -1, keepdims=True)).astype(value.dtype)


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
