"""The latent's diagonal Gaussian posterior, and what it has in common with a quantised latent."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Latent(Protocol):
    """What an encoder says about a picture: `Posterior` with KL regularisation, `Quantized` with a codebook."""

    def sample(self, key: jax.Array) -> jax.Array:
        """What the decoder is given in training, (b, h, w, c) float32."""

    def mode(self) -> jax.Array:
        """What inference, and a diffusion model, works on, (b, h, w, c) float32."""

    def penalties(self) -> dict[str, jax.Array]:
        """Scalars that regularise the latent, by the names that their weights have in the loss's configuration."""


class Posterior(NamedTuple):
    """A diagonal Gaussian over (b, h, w, c) latents, float32."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> Posterior:
        """Splits (b, h, w, 2c) into mean and log variance, the latter clipped to [-30, 20] as in the reference."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw, (b, h, w, c)."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> jax.Array:
        """The mean, (b, h, w, c)."""
        return self.mean

    def kl(self) -> jax.Array:
        """KL divergence to the standard normal, summed over each sample: (b,)."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))

    def penalties(self) -> dict[str, jax.Array]:
        """ "kl", the mean over the batch."""
        return {"kl": jnp.mean(self.kl())}
