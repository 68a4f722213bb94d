"""The codebook of a VQ-regularised latent, and what it makes of an encoder's output."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

# The search compares with so many codes at a time: a 1024 x 1024 picture has 65,536 latents at f = 4, whose distances
# to 16,384 codes at once would be 4 GiB.
CODES_AT_ONCE = 256


class Quantized(NamedTuple):
    """A latent before and after quantisation: (b, h, w, c) float32 each, and the (b, h, w) numbers of its codes."""

    z: Float[Array, "b h w c"]
    nearest: Float[Array, "b h w c"]
    codes: Int[Array, "b h w"]

    def sample(self, key: jax.Array) -> Float[Array, "b h w c"]:
        """The codes' vectors, whose gradient passes straight through to `z`; nothing is drawn with `key`."""
        return self.z + jax.lax.stop_gradient(self.nearest - self.z)

    def mode(self) -> Float[Array, "b h w c"]:
        """The latent before quantisation, (b, h, w, c), which `Autoencoder.decode` quantises.

        Latent diffusion works on these, and so does diffusers' VQModel.
        """
        return self.z

    def penalties(self) -> dict[str, Float[Array, ""]]:
        """Mean squared distances of two equal values: "codebook" draws the codes, "commitment" the encoder."""
        return {
            "codebook": jnp.mean(jnp.square(self.nearest - jax.lax.stop_gradient(self.z))),
            "commitment": jnp.mean(jnp.square(jax.lax.stop_gradient(self.nearest) - self.z)),
        }


class Codebook(nnx.Module):
    """Vectors of which the nearest stands for a latent (VQ-VAE, arXiv 1711.00937; VQGAN, arXiv 2012.09841)."""

    def __init__(self, size: int, channels: int, *, rngs: nnx.Rngs) -> None:
        # Uniform in ±1 / size, as in the reference.
        values = jax.random.uniform(rngs.params(), (size, channels), jnp.float32, -1 / size, 1 / size)
        self.embedding = nnx.Param(values)

    def __call__(self, z: Float[Array, "b h w c"]) -> Quantized:
        """Quantises (b, h, w, channels) of any float type, in float32."""
        z = z.astype(jnp.float32)
        codes = nearest_codes(jax.lax.stop_gradient(z), jax.lax.stop_gradient(self.embedding[...]))
        return Quantized(z, self.embedding[...][codes], codes)

    def shares(self, codes: Int[Array, "b h w"]) -> Float[Array, " size"]:
        """Which share of `codes` each code has: (b, h, w) -> (size,) float32. Means over batches are the whole's."""
        counts = jnp.zeros(self.embedding.shape[0], jnp.float32).at[codes].add(1.0)
        return counts / codes.size


def nearest_codes(z: jax.Array, embedding: jax.Array) -> jax.Array:
    """The nearest row of `embedding`, (size, c), to each vector of `z`, (..., c); of equally near ones the first.

    By ‖e‖² - 2 z·e, to which ‖z‖² would add nothing that differs between the codes.
    """
    size, channels = embedding.shape
    parts = -(-size // CODES_AT_ONCE)
    length = -(-size // parts)
    padding = parts * length - size
    squares = jnp.pad(jnp.sum(jnp.square(embedding), -1), (0, padding), constant_values=jnp.inf)
    vectors = jnp.pad(embedding, ((0, padding), (0, 0)))

    def closer(
        best: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        distance, code = best
        first, vectors, squares = part
        # Rounding to bfloat16, as accelerators' products do by default, would choose other codes.
        products = jnp.einsum("...c,nc->...n", z, vectors, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.expand_dims(squares, range(z.ndim - 1)) - 2.0 * products
        nearest = jnp.argmin(distances, -1).astype(jnp.int32)
        least = jnp.min(distances, -1)
        return (jnp.minimum(distance, least), jnp.where(least < distance, first + nearest, code)), None

    # Made of `z`, the first distances lie where it does on a mesh.
    start = (jnp.full_like(z[..., 0], jnp.inf), jnp.zeros_like(z[..., 0], jnp.int32))
    firsts = length * jnp.arange(parts, dtype=jnp.int32)
    slices = (firsts, vectors.reshape(parts, length, channels), squares.reshape(parts, length))
    (_, codes), _ = jax.lax.scan(closer, start, slices)
    return codes


def usage(shares: jax.Array) -> dict[str, jax.Array]:
    """How a batch uses the codebook, from the codes' `shares`, (size,).

    Returns:
        "perplexity", the exponential of the entropy (the number of codes, were all used equally), and "codes_used",
        the share of the codes that occur at all.
    """
    logs = jnp.log(jnp.where(shares > 0, shares, 1.0))
    return {"perplexity": jnp.exp(-jnp.sum(shares * logs)), "codes_used": jnp.mean(shares > 0, dtype=jnp.float32)}
