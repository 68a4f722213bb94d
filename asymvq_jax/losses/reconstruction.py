"""The reconstruction loss: the reference's sums, or VQGAN's means."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asymvq_jax.losses.lpips import LPIPS


def reconstruction_loss(
    image: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    lpips: LPIPS | None,
    perceptual_weight: float,
    reduction: str = "sum",
    squared_weight: float = 0.0,
    *,
    emphasis: Float[Array, "b h w 1"] | None = None,
    pasted: Float[Array, "b h w 1"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L1 plus LPIPS, the latter broadcast to every element, reduced over each sample and averaged over the batch.

    Args:
        image: (b, h, w, 3) float32, the reconstruction.
        target: (b, h, w, 3) float32 in [-1, 1].
        lpips: the perceptual distance; None leaves it out.
        perceptual_weight: its weight.
        reduction: "sum" or "mean".
        squared_weight: of the mean squared error, beside the mean absolute one.
        emphasis: (b, h, w, 1), how often each pixel counts in both; by default once.
        pasted: (b, h, w, 1), 1 = generate; where given, LPIPS is taken of the target with the image pasted in.

    Returns:
        The loss (with "sum" the reference's nll at logvar 0), and its parts as means: "l1" per element, "lpips" per
        picture.
    """
    difference = jnp.abs(image - target)
    parts = {"l1": jnp.mean(difference)}
    error = difference + squared_weight * jnp.square(difference) if squared_weight else difference
    total = jnp.mean(error if emphasis is None else emphasis * error)
    if lpips is not None:
        seen = image if pasted is None else target + pasted * (image - target)
        with jax.named_scope("lpips_original"):
            wanted = lpips.features(target)
        with jax.named_scope("lpips_reconstruction"):
            parts["lpips"] = jnp.mean(lpips.distance(lpips.features(seen), wanted))
        total = total + perceptual_weight * parts["lpips"]
    return total * (math.prod(image.shape[1:]) if reduction == "sum" else 1), parts
