"""The reconstruction loss with the reference's sums."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from asymvq_jax.losses.lpips import LPIPS


def reconstruction_loss(
    image: jax.Array, target: jax.Array, lpips: LPIPS | None, perceptual_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 plus LPIPS, the latter broadcast to every element, summed over each sample and averaged over the batch.

    Args:
        image: (b, h, w, 3) float32, the reconstruction.
        target: (b, h, w, 3) float32 in [-1, 1].
        lpips: the perceptual distance; None leaves it out.
        perceptual_weight: its weight.

    Returns:
        The loss (the reference's nll at logvar 0), and its parts as means: "l1" per element, "lpips" per picture.
    """
    l1 = jnp.mean(jnp.abs(image - target))
    parts = {"l1": l1}
    total = l1
    if lpips is not None:
        parts["lpips"] = jnp.mean(lpips.distance(lpips.features(image), lpips.features(target)))
        total = total + perceptual_weight * parts["lpips"]
    return total * math.prod(image.shape[1:]), parts
