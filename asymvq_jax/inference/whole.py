"""Encode, decode and inpaint pictures of any size; for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from asymvq_jax.config import ModelConfig
from asymvq_jax.devices import sharding
from asymvq_jax.errors import InputError
from asymvq_jax.files import images
from asymvq_jax.inference.blend import BAND, MIXING, Blend, check_blend, composite
from asymvq_jax.inference.edges import distance
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import merge, split

M = TypeVar("M", bound=nnx.Module)


class Inpainting(NamedTuple):
    """A finished picture, (h, w, 3) uint8, and the tone step that pasting covered (None where nothing was pasted)."""

    image: np.ndarray
    tone_step: float | None


def pad(x: jax.Array | np.ndarray, multiple: int) -> jax.Array:
    """Repeats the last row and column of (b, h, w, c) until height and width are multiples of `multiple`."""
    _, h, w, _ = x.shape
    return jnp.pad(jnp.asarray(x), ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


@nnx.jit
def _encode(model: Autoencoder, image: jax.Array) -> jax.Array:
    return model.encode(image).mode()


@nnx.jit
def _decode(model: Autoencoder, z: jax.Array, image: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    return model.decode(z, image, mask)


def encode(model: Autoencoder, image: jax.Array | np.ndarray, *, mesh: Mesh | None = None) -> jax.Array:
    """The posterior's mode.

    Args:
        model: the autoencoder.
        image: (b, h, w, 3) float in [-1, 1], of any size.
        mesh: see `decode`.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), latent_channels) float32, not scaled for a diffusion model.
    """
    image = pad(image, model.config.downsampling)
    return _over(mesh, image.shape[1] // model.config.downsampling, _encode, model, image)


def decode(
    model: Autoencoder,
    latent: jax.Array | np.ndarray,
    image: jax.Array | np.ndarray | None = None,
    mask: jax.Array | np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Decodes a latent, conditioned on a picture's unmasked pixels where one is given.

    Args:
        model: the autoencoder.
        latent: as `encode` returns it.
        image: (b, h, w, 3) float in [-1, 1], of any size.
        mask: (b, h, w, 1) float, 1 = generate, 0 = preserve.
        size: height and width to crop to; by default the image's, or all that the latent covers.
        mesh: splits the work over its devices, with the same result: from `sharding.make_mesh` the batch, from
            `sharding.make_height_mesh` the rows of pictures that one device cannot hold (on one device, see
            `asymvq_jax.strips`). The weights are copied there at every call unless `place` has put them there.

    Returns:
        (b, h, w, 3) float32, not clipped.

    Raises:
        InputError: the batch, or the latent's rows, cannot be split evenly over the mesh.
    """
    if image is not None and mask is not None:
        size = size or image.shape[1:3]
        multiple = model.config.downsampling
        image, mask = pad(image, multiple), pad(mask, multiple)
    result = _over(mesh, latent.shape[1], _decode, model, latent, image, mask)
    return result if size is None else result[:, : size[0], : size[1]]


def place(model: M, mesh: Mesh) -> M:
    """The model with its weights on every device of `mesh`, so that `encode` and `decode` need not copy them there."""
    graphdef, params = split(model)
    return merge(graphdef, jax.device_put(params, sharding.replicated(mesh)))


def _over(
    mesh: Mesh | None, rows: int, function: Callable, model: Autoencoder, *arrays: jax.Array | np.ndarray | None
) -> jax.Array:
    """Calls `function`, with `arrays` split over the devices of `mesh` and the weights on each of them.

    Args:
        mesh: None calls it as it is.
        rows: the latent's, the fewest that have to be split.
        function: takes the model and the arrays.
        model: the autoencoder.
        arrays: (b, h, w, c) each, or None.
    """
    if mesh is None:
        return function(model, *arrays)
    by_rows = sharding.HEIGHT in mesh.shape
    count = rows if by_rows else len(arrays[0])
    if count % mesh.size:
        what = f"the latent has {count} rows" if by_rows else f"the batch has {count} pictures"
        raise InputError(
            f"{what}, which {mesh.size} devices cannot split evenly; use a number of devices that divides {count}"
        )
    split = sharding.height_sharding(mesh) if by_rows else sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        return function(place(model, mesh), *jax.device_put(arrays, split))


def read_latent(array: np.ndarray, config: ModelConfig, size: tuple[int, int], *, scaled: bool = True) -> jax.Array:
    """Brings an edited latent into the form that `decode` takes.

    Args:
        array: (c, h, w) or (h, w, c), or either with a leading 1, as PyTorch or JAX pipelines return latents.
        config: the model's.
        size: height and width of the picture.
        scaled: whether it is (z - shift_factor) * scaling_factor, as diffusion models have it.

    Returns:
        (1, h, w, c) float32, not scaled.

    Raises:
        InputError: the latent is not of the picture's size; the message gives both shapes.
    """
    height, width = (-(-side // config.downsampling) for side in size)
    channels = config.latent_channels
    latent = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if latent.shape == (channels, height, width) and latent.shape != (height, width, channels):
        latent = latent.transpose(1, 2, 0)
    if latent.shape != (height, width, channels):
        raise InputError(
            f"the latent has shape {array.shape}: expected ({channels}, {height}, {width}) or "
            f"({height}, {width}, {channels}), with or without a leading 1, for a picture of {size[1]} x {size[0]} px"
        )
    if not np.isfinite(latent).all():
        raise InputError("the latent holds values that are not finite (NaN or infinity)")
    latent = latent.astype(np.float32)
    if scaled:
        latent = latent / np.float32(config.scaling_factor) + np.float32(config.shift_factor)
    return jnp.asarray(latent[None])


def inpaint(
    model: Autoencoder,
    image: np.ndarray,
    mask: np.ndarray,
    latent: np.ndarray | None = None,
    *,
    keep: Literal["model", "exact"] = "model",
    blend: Blend = "feather",
    band: int = BAND,
    scaled: bool = True,
    encode: Callable[..., jax.Array] = encode,
    decode: Callable[..., jax.Array | np.ndarray] = decode,
) -> Inpainting:
    """Decodes a latent so that the picture's unmasked pixels stay.

    Args:
        model: an autoencoder with a condition branch.
        image: (h, w, 3) uint8, of any size.
        mask: (h, w) or (h, w, 1); bool, or numbers in [0, 1]: 1 = generate, 0 = preserve.
        latent: an edited latent (see `read_latent`); None: the picture's own.
        keep: "model" returns what the decoder made; "exact" also pastes the original's pixels, bit for bit, wherever
            they are preserved.
        blend: how "exact" sets the decoder's fill into the original; see `asymvq_jax.inference.blend.composite`.
            "feather" and "multiband" mix the two in a band around the mask, where kept pixels change.
        band: its width, px; 0 pastes up to the mask's edge.
        scaled: see `read_latent`.
        encode, decode: for large pictures, the functions of `asymvq_jax.strips`, or this module's with a mesh.

    Returns:
        The picture; and with keep="exact" the tone step that pasting covered: the mean absolute difference between the
        decoder's and the original's colours over the preserved pixels next to the mask (in the band, where there is
        one), in levels of 0 to 255.

    Raises:
        InputError: the shapes do not agree, or the model cannot preserve anything.
    """
    check_condition(model.config)
    mask = check_mask(mask, image)
    if keep not in ("model", "exact"):
        raise InputError(f"keep={keep!r}: expected 'model' or 'exact'")
    check_blend(blend, band)
    pixels = images.to_float(image)[None]
    if latent is None:
        z = encode(model, pixels)
    else:
        z = read_latent(np.asarray(latent), model.config, image.shape[:2], scaled=scaled)
    result = images.to_uint8(decode(model, z, pixels, mask[None])[0])
    return paste(result, image, mask, band, blend) if keep == "exact" else Inpainting(result, None)


def check_condition(config: ModelConfig, name: str = "this model") -> None:
    """Raises InputError, which says `name`, unless the model can take a picture and a mask."""
    if not config.condition:
        raise InputError(
            f"{name} has no condition branch, so it cannot preserve pixels (model.condition=False); "
            "use a checkpoint of an asymmetric decoder"
        )


def check_mask(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Brings a mask to (h, w, 1) float32.

    Raises:
        InputError: it is not of the picture's size, or has values outside [0, 1].
    """
    mask = np.asarray(mask)
    mask = mask[..., None] if mask.ndim == 2 else mask
    if mask.shape != (*image.shape[:2], 1):
        (h, w), (ih, iw) = mask.shape[:2], image.shape[:2]
        raise InputError(f"the mask is {w} x {h} px and the picture {iw} x {ih} px; they must be of one size")
    mask = mask.astype(np.float32)
    if not ((mask >= 0) & (mask <= 1)).all():
        raise InputError(
            f"the mask has values from {mask.min()} to {mask.max()}: expected 0 (preserve) to 1 (generate)"
        )
    return mask


def paste(
    result: np.ndarray, original: np.ndarray, mask: np.ndarray, band: int = BAND, blend: Blend = "feather"
) -> Inpainting:
    """Sets the original's preserved pixels over `result`; see `inpaint` (keep="exact")."""
    preserved = mask[..., 0] == 0
    near = preserved & (distance(preserved) <= max(band if blend in MIXING else 0, 1))
    step = np.abs(result.astype(np.float32) - original.astype(np.float32))[near]
    image = composite(result, original, mask, blend, band)
    return Inpainting(image, float(step.mean()) if step.size else 0.0)
