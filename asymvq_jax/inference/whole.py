"""Encodes and decodes pictures of any size, whole or split over devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from asymvq_jax.config import ModelConfig
from asymvq_jax.devices import sharding
from asymvq_jax.errors import InputError
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import jitted, merge, split

M = TypeVar("M", bound=nnx.Module)
# Takes a model and arrays.
Program = Callable[..., jax.Array]


def pad(x: jax.Array | np.ndarray, multiple: int) -> jax.Array:
    """Repeats the last row and column of (b, h, w, c) until height and width are multiples of `multiple`."""
    _, h, w, _ = x.shape
    return jnp.pad(jnp.asarray(x), ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


@jitted
def encode_program(model: Autoencoder, image: jax.Array) -> jax.Array:
    """`encode` of pictures whose sizes are multiples of the model's downsampling; one jitted program."""
    return model.encode(image).mode()


def _decode(
    model: Autoencoder, z: jax.Array, image: jax.Array | None, mask: jax.Array | None, *, margin: int = 0
) -> jax.Array:
    return model.decode(z, image, mask, margin=margin)


# `decode` of arrays whose sizes are multiples of the model's downsampling; one jitted program.
decode_program: Callable[..., jax.Array] = jitted(_decode, static_argnames="margin")


def encode(
    model: Autoencoder,
    image: Float[Array | np.ndarray, "b h w c"],
    *,
    mesh: Mesh | None = None,
    program: Program = encode_program,
) -> Float[Array, "b y x z"]:
    """The posterior's mode.

    Args:
        model: the autoencoder.
        image: (b, h, w, 3) float in [-1, 1], of any size.
        mesh: see `decode`.
        program: `encode_program`, or what has been compiled of it.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), latent_channels) float32, not scaled for a diffusion model.

    Raises:
        InputError: the pictures have a wrong shape or type, or cannot be split evenly over the mesh.
    """
    check_pixels(image, model.config)
    image = pad(image, model.config.downsampling)
    return _over(mesh, image.shape[1] // model.config.downsampling, program, model, image)


def decode(
    model: Autoencoder,
    latent: Float[Array | np.ndarray, "b y x z"],
    image: Float[Array | np.ndarray, "#b h w c"] | None = None,
    mask: Float[Array | np.ndarray, "#b h w 1"] | None = None,
    size: tuple[int, int] | None = None,
    *,
    margin: int = 0,
    mesh: Mesh | None = None,
    program: Program = decode_program,
) -> Float[Array, "b h w c"]:
    """Decodes a latent, conditioned on a picture's unmasked pixels where one is given.

    Args:
        model: the autoencoder.
        latent: as `encode` returns it.
        image: (b, h, w, 3) float in [-1, 1], of any size; or one picture with one mask for all latents, which computes
            its condition once.
        mask: (b, h, w, 1) float, 1 = generate, 0 = preserve.
        size: height and width to crop to; by default the image's, or all that the latent covers.
        margin: see `Autoencoder.decode`.
        mesh: splits the work over its devices, with the same result: from `sharding.make_mesh` the batch, from
            `sharding.make_height_mesh` the rows of pictures that one device cannot hold (on one device, see
            `inference.strips`). The weights are copied there at every call unless `place` has put them there.
        program: `decode_program`, or what has been compiled of it.

    Returns:
        (b, h, w, 3) float32, not clipped.

    Raises:
        InputError: the pictures or masks have a wrong shape or type, or the batch, or the latent's rows, cannot be
            split evenly over the mesh.
    """
    if (image is None) != (mask is None):
        raise InputError("a picture without a mask, or a mask without a picture: expected both or neither")
    if image is not None and mask is not None:
        check_pixels(image, model.config)
        check_masks(mask, image)
        size = size or (image.shape[1], image.shape[2])
        multiple = model.config.downsampling
        image, mask = pad(image, multiple), pad(mask, multiple)
        if mesh is not None and len(image) == 1 < len(latent):
            # Each device needs the picture beside its own latents.
            image, mask = (jnp.repeat(x, len(latent), axis=0) for x in (image, mask))
    program = partial(program, margin=margin) if margin else program
    result = _over(mesh, latent.shape[1], program, model, latent, image, mask)
    return result if size is None else result[:, : size[0], : size[1]]


def place(model: M, mesh: Mesh) -> M:
    """The model with its weights on every device of `mesh`, so that `encode` and `decode` need not copy them there."""
    graphdef, params = split(model)
    placed: M = merge(graphdef, jax.device_put(params, sharding.replicated(mesh)))
    return placed


def _over(
    mesh: Mesh | None,
    rows: int,
    function: Program,
    model: Autoencoder,
    first: jax.Array | np.ndarray,
    *others: jax.Array | np.ndarray | None,
) -> jax.Array:
    """Calls `function`, with its arrays split over the devices of `mesh` and the weights on each of them.

    Args:
        mesh: None calls it without splitting.
        rows: the latent's, the fewest that have to be split.
        function: takes the model and the arrays.
        model: the autoencoder.
        first: (b, h, w, c).
        others: (b, h, w, c) each, or None.
    """
    if mesh is None:
        return function(model, first, *others)
    by_rows = sharding.HEIGHT in mesh.shape
    count = rows if by_rows else len(first)
    if count % mesh.size:
        what = f"the latent has {count} rows" if by_rows else f"the batch has {count} pictures"
        raise InputError(
            f"{what}, which {mesh.size} devices cannot split evenly; use a number of devices that divides {count}"
        )
    split = sharding.height_sharding(mesh) if by_rows else sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        return function(place(model, mesh), *jax.device_put((first, *others), split))


def check_condition(config: ModelConfig, name: str = "this model") -> None:
    """Raises InputError, which says `name`, unless the model can take a picture and a mask."""
    if not config.condition:
        raise InputError(
            f"{name} has no condition branch, so it cannot preserve pixels (model.condition=False); "
            "use a checkpoint of an asymmetric decoder"
        )


def check_pixels(image: jax.Array | np.ndarray, config: ModelConfig) -> None:
    """Raises InputError unless these are (b, h, w, c) pictures of floats in [-1, 1].

    The range is checked for NumPy arrays only: for JAX arrays it would have to be computed first.
    """
    shape, dtype = tuple(image.shape), image.dtype
    if len(shape) != 4 or shape[3] != config.image_channels or 0 in shape:
        raise InputError(f"pictures of shape {shape}: expected (b, h, w, {config.image_channels})")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"pictures of type {dtype}: expected floats in [-1, 1]; images.to_float converts uint8")
    if isinstance(image, np.ndarray) and not (np.abs(image) <= 1.01).all():
        raise InputError(f"pictures with values from {image.min()} to {image.max()}: expected floats in [-1, 1]")


def check_masks(mask: jax.Array | np.ndarray, image: jax.Array | np.ndarray) -> None:
    """Raises InputError unless these are (b, h, w, 1) masks of the pictures' size, in [0, 1]; see `check_pixels`."""
    if tuple(mask.shape) != (*image.shape[:3], 1):
        raise InputError(f"masks of shape {tuple(mask.shape)}: expected {(*image.shape[:3], 1)}, as the pictures have")
    if isinstance(mask, np.ndarray) and not ((mask >= 0) & (mask <= 1)).all():
        raise InputError(f"masks with values from {mask.min()} to {mask.max()}: expected 0 (preserve) to 1 (generate)")
