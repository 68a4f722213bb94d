"""The reconstruction loss: the reference's sums, or VQGAN's means."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from asymvq_jax.losses.lpips import LPIPS


def reconstruction_loss(
    image: jax.Array, target: jax.Array, lpips: LPIPS | None, perceptual_weight: float, reduction: str = "sum"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 plus LPIPS, the latter broadcast to every element, reduced over each sample and averaged over the batch.

    Args:
        image: (b, h, w, 3) float32, the reconstruction.
        target: (b, h, w, 3) float32 in [-1, 1].
        lpips: the perceptual distance; None leaves it out.
        perceptual_weight: its weight.
        reduction: "sum" or "mean".

    Returns:
        The loss (with "sum" the reference's nll at logvar 0), and its parts as means: "l1" per element, "lpips" per
        picture.
    """
    l1 = jnp.mean(jnp.abs(image - target))
    parts = {"l1": l1}
    total = l1
    if lpips is not None:
        parts["lpips"] = jnp.mean(lpips.distance(lpips.features(image), lpips.features(target)))
        total = total + perceptual_weight * parts["lpips"]
    return total * (math.prod(image.shape[1:]) if reduction == "sum" else 1), parts
