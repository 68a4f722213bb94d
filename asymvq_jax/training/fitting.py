"""A condition branch that begins with what the decoder itself computes, instead of at random.

Where pixels are kept, the branch's features take the decoder's place, and the group normalisations see them. A random
branch moves the normalisations' statistics of the whole picture, and a decoder that was good is broken under the mask
as well; to mend it takes small models longer than they are trained for. Here every convolution of the branch is the
least-squares map from the features before it to what the decoder has at that place when it decodes the picture's own
latent without a condition, over the kept pixels of a few batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax.files.images import to_float
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.blocks import Conv
from asymvq_jax.models.parameters import merge
from asymvq_jax.training.state import Blueprint, TrainState
from asymvq_jax.training.step import Batch

log = logging.getLogger(__name__)

# Added to the inputs' mean squares, so that inputs which are never there get no weight.
RIDGE = 1e-4


def fit_condition(
    blueprint: Blueprint, state: TrainState, next_batch: Callable[[], Batch], count: int
) -> dict[str, np.ndarray]:
    """The condition branch's parameters, layer by layer in closed form.

    Args:
        blueprint: the static side of the run.
        state: its state; the decoder is what the branch is to agree with.
        next_batch: gives a batch as `train_step` takes it.
        count: how many batches each layer is fitted to.

    Returns:
        The parameters by name; the state's are left alone.
    """
    params = {**state.frozen, **state.params}
    fitted: dict[str, np.ndarray] = {}
    for index in range(len(blueprint.config.model.decoder_channels) + 1):
        # The layers before this one are fitted, and no longer change.
        sums = jax.jit(lambda params, batch, index=index: _sums(merge(blueprint.autoencoder, params), batch, index))
        total = sum_trees([jax.device_get(sums({**params, **fitted}, next_batch())) for _ in range(count)])
        layer = f"decoder.condition.layers.{index}"
        shape = params[f"{layer}.kernel"].shape
        weights, unexplained = solve(*total)
        # The patches' channels come before their rows and columns.
        kernel = weights[:-1].reshape(shape[2], shape[0], shape[1], shape[3]).transpose(1, 2, 0, 3)
        fitted |= {f"{layer}.kernel": kernel, f"{layer}.bias": weights[-1]}
        log.info(
            "condition branch, layer %d: %.0f%% of the decoder's variance explained", index, 100 - 100 * unexplained
        )
    return fitted


Sums = tuple[np.ndarray, ...]


def _sums(model: Autoencoder, batch: Batch, index: int) -> tuple[jax.Array, ...]:
    """What least squares of one layer needs, over the kept pixels of one batch; see `solve`."""
    image, mask = to_float(batch["image"]), batch["mask"].astype(jnp.float32)
    z = model.encode(image).mode()
    z = z if model.post_quant_conv is None else model.post_quant_conv(z)
    target = model.decoder.unconditioned(z)[index].astype(jnp.float32)
    assert model.decoder.condition is not None
    x = model.decoder.condition_input(image, mask)
    if index:
        x = jax.nn.relu(model.decoder.condition(x)[index - 1].astype(jnp.float32))
    patches = _patches(x, model.decoder.condition.layers[index])
    stride = mask.shape[1] // patches.shape[1]
    kept = 1 - mask[:, ::stride, ::stride]
    inputs = jnp.concatenate([patches, jnp.ones_like(kept)], -1) * kept
    target = target * kept
    inner = jnp.einsum("bhwi,bhwj->ij", inputs, inputs)
    return inner, jnp.einsum("bhwi,bhwj->ij", inputs, target), jnp.square(target).sum((0, 1, 2)), target.sum((0, 1, 2))


def _patches(x: jax.Array, conv: Conv) -> jax.Array:
    """(b, h, w, c) -> (b, h', w', c * rows * columns): what each of the convolution's outputs reads."""
    return jax.lax.conv_general_dilated_patches(
        x, conv.kernel.shape[:2], (conv.stride,) * 2, (conv.padding,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def sum_trees(parts: list[Sums]) -> Sums:
    """The sums of arrays, in float64."""
    return tuple(np.sum([np.asarray(x, np.float64) for x in same], 0) for same in zip(*parts, strict=True))


def solve(inner: np.ndarray, outer: np.ndarray, squares: np.ndarray, totals: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares from sums over pixels.

    Args:
        inner: (n, n), of products of inputs, the last of which is 1.
        outer: (n, m), of inputs times targets.
        squares: (m,), of the targets' squares.
        totals: (m,), of the targets.

    Returns:
        (n, m) float32 weights, and the share of the targets' variance that they leave; zeros and 1 without pixels.
    """
    count = inner[-1, -1]
    if not count:
        return np.zeros(outer.shape, np.float32), 1.0
    weights = np.linalg.solve(inner + RIDGE * count * np.eye(len(inner)), outer)
    left = squares.sum() - 2 * (weights * outer).sum() + (weights * (inner @ weights)).sum()
    variance = (squares - totals**2 / count).sum()
    return weights.astype(np.float32), float(left / variance) if variance else 1.0
