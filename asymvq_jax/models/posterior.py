"""The latent's diagonal Gaussian posterior, and what it has in common with a quantised latent."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Latent(Protocol):
    """What an encoder says about a picture: `Posterior` with KL regularisation, `Quantized` with a codebook."""

    def sample(self, key: jax.Array) -> Float[Array, "b h w c"]:
        """What the decoder is given in training, (b, h, w, c) float32."""

    def mode(self) -> Float[Array, "b h w c"]:
        """What inference, and a diffusion model, works on, (b, h, w, c) float32."""

    def penalties(self) -> dict[str, Float[Array, ""]]:
        """Scalars that regularise the latent, by the names that their weights have in the loss's configuration."""


class Posterior(NamedTuple):
    """A diagonal Gaussian over (b, h, w, c) latents, float32."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    @classmethod
    def from_moments(cls, moments: Float[Array, "b h w 2*c"]) -> Posterior:
        """Splits (b, h, w, 2c) into mean and log variance, the latter clipped to [-30, 20] as in the reference."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> Float[Array, "b h w c"]:
        """One draw, (b, h, w, c)."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def mode(self) -> Float[Array, "b h w c"]:
        """The mean, (b, h, w, c)."""
        return self.mean

    def kl(self) -> Float[Array, " b"]:
        """KL divergence to the standard normal, summed over each sample: (b,)."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar, axis=(1, 2, 3))

    def penalties(self) -> dict[str, Float[Array, ""]]:
        """ "kl", the mean over the batch."""
        return {"kl": jnp.mean(self.kl())}
