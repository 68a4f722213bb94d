"""The hinge GAN's terms and the adaptive weight that balances them with the reconstruction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def discriminator_hinge(real: Float[Array, ...], fake: Float[Array, ...]) -> Float[Array, ""]:
    """mean(relu(1 - real)) / 2 + mean(relu(1 + fake)) / 2 of two arrays of logits (arXiv 1705.02894)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def generator_term(fake: Float[Array, ...]) -> Float[Array, ""]:
    """-mean(fake), the generator's side of the hinge."""
    return -jnp.mean(fake)


def adaptive_weight(
    nll_gradient: Float[Array, "*kernel"], generator_gradient: Float[Array, "*kernel"]
) -> Float[Array, ""]:
    """λ = ‖∂nll/∂w‖ / (‖∂g/∂w‖ + 1e-4), clipped to [0, 1e4] (VQGAN, arXiv 2012.09841, equation 7).

    Args:
        nll_gradient: gradient of the reconstruction loss with respect to the last convolution's kernel.
        generator_gradient: that of the generator's term.
    """
    ratio = jnp.linalg.norm(nll_gradient.ravel()) / (jnp.linalg.norm(generator_gradient.ravel()) + 1e-4)
    return jnp.clip(ratio, 0.0, 1e4)
