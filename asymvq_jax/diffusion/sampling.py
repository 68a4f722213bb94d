"""From texts, pictures and masks to latents: what each task feeds to the denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.devices import sharding
from asymvq_jax.diffusion.clip import ImageEncoder, TextEncoder, prepare_example
from asymvq_jax.diffusion.denoising import Batch, Known, denoise
from asymvq_jax.diffusion.pipeline import Pipeline, Task
from asymvq_jax.diffusion.solvers import make_solver
from asymvq_jax.diffusion.unet import Added, UNetConfig
from asymvq_jax.errors import SamplingError
from asymvq_jax.files import images
from asymvq_jax.files.masks import HAZE, reduce_mask
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import jitted


def text_to_image(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    *,
    negative: str = "",
    guidance: float = 7.5,
    steps: int = 50,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Latents of pictures that texts describe.

    Args:
        pipeline: loaded for "text".
        prompts: one a picture.
        seeds: of the noise, one a picture; a picture is the same in any batch.
        size: height and width, px.
        negative: what guidance leads away from.
        guidance: 1 or less for none, which halves the work.
        steps: of the sampler.
        mesh: from `sharding.make_mesh`, splits the batch, which has to be a multiple of the devices. The weights are
            copied there at every call unless `pipeline.place` has put them there.

    Returns:
        (b, h / 8, w / 8, c) float32, scaled as a diffusion model has them (`decode` takes them).

    Raises:
        SamplingError: a size that the networks cannot halve so often; a pipeline of another task; prompts and seeds of
            different number, or which the mesh cannot split.
    """
    _check(pipeline, "text", len(prompts), seeds, mesh)
    check_size(pipeline.unet.config, pipeline.autoencoder.config, size)
    shape = [side // pipeline.autoencoder.config.downsampling for side in size]
    context, added = _texts(pipeline, prompts, negative, shape, guided=guidance > 1)
    batch = Batch(_noise(pipeline, seeds, shape), context, added=added)
    return _run(pipeline, batch, seeds, guidance, steps, mesh=mesh)


def inpaint(
    pipeline: Pipeline,
    prompts: Sequence[str],
    image: np.ndarray,
    mask: np.ndarray,
    seeds: Sequence[int],
    *,
    negative: str = "",
    guidance: float = 7.5,
    steps: int = 50,
    strength: float = 1.0,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Latents of pictures whose masked region a text describes; arguments as in `text_to_image`, and:

    Args:
        pipeline: loaded for "inpaint". A network made for it sees picture and mask. Any other one is given the
            picture's latent with noise on it outside of the mask, after each step.
        image: (b, h, w, 3) uint8, of any size.
        mask: (b, h, w, 1); bool, or numbers in [0, 1]; what is above 0 is generated. For a network that was not made
            for inpainting, a grey pixel is generated in the last steps only, as large a share of them as its value.
        strength: the share of the steps that are done, in (0, 1]; below 1 the masked region starts from what is there.
        prompts, seeds, negative, guidance, steps, mesh: see `text_to_image`.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), c) float32.

    Raises:
        UserError: as `text_to_image`; or pictures and masks that do not fit; or a strength that leaves no step.
    """
    _check(pipeline, "inpaint", len(prompts), seeds, mesh)
    mask = _check_pictures(image, mask, len(seeds))
    made_for_it = pipeline.unet.config.in_channels > pipeline.unet.config.out_channels
    known = fixed = None
    if made_for_it:
        masked, small = _masked_latent(pipeline, image, mask, mesh)
        fixed = jnp.concatenate([small, masked], -1)
    if not made_for_it or strength < 1:
        pixels, small = _padded(pipeline, image, mask)
        known = Known(_encoded(pipeline, pixels, mesh), None if made_for_it else small)
    shape = small.shape[1:3]
    context, added = _texts(pipeline, prompts, negative, shape, guided=guidance > 1)
    batch = Batch(_noise(pipeline, seeds, shape), context, fixed, known, added=added)
    return _crop(pipeline, _run(pipeline, batch, seeds, guidance, steps, strength, mesh), image)


def edit(
    pipeline: Pipeline,
    examples: Sequence[np.ndarray],
    image: np.ndarray,
    mask: np.ndarray,
    seeds: Sequence[int],
    *,
    guidance: float = 5.0,
    steps: int = 50,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Latents of pictures into whose masked region the content of an example picture is painted (Paint-by-Example).

    Args:
        pipeline: loaded for "edit".
        examples: (h, w, 3) uint8 each, of any sizes, one a picture.
        image, mask: see `inpaint`.
        seeds, guidance, steps, mesh: see `text_to_image`.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), c) float32.

    Raises:
        SamplingError: as `text_to_image`; or pictures and masks that do not fit.
    """
    _check(pipeline, "edit", len(examples), seeds, mesh)
    masked, small = _masked_latent(pipeline, image, _check_pictures(image, mask, len(seeds)), mesh)
    encoder, preparation = pipeline.image_encoder, pipeline.example
    assert encoder is not None, "a pipeline that is loaded for this task has it"
    assert preparation is not None, "a pipeline that is loaded for this task has it"
    features = _encode(encoder, jnp.stack([prepare_example(example, preparation) for example in examples]))[:, None]
    if guidance > 1:
        nothing = jnp.broadcast_to(encoder.unconditional[...].astype(features.dtype)[None], features.shape)
        features = jnp.concatenate([nothing, features], 1)
    # Paint-by-Example's mask is of the other polarity and comes last.
    fixed = jnp.concatenate([masked, 1 - small], -1)
    batch = Batch(_noise(pipeline, seeds, masked.shape[1:3]), features, fixed)
    return _crop(pipeline, _run(pipeline, batch, seeds, guidance, steps, mesh=mesh), image)


def decode(
    model: Autoencoder,
    latent: jax.Array | np.ndarray,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    size: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Pictures, (b, h, w, 3) uint8, of the latents that this module's functions return.

    Args:
        model: the autoencoder whose decoder is to be used; one without a condition branch ignores picture and mask.
        latent: (b, h / 8, w / 8, c).
        image: (b, h, w, 3) uint8, the pictures whose pixels are to be kept where the mask is 0.
        mask: (b, h, w, 1); bool, or numbers in [0, 1]; 1 = generate.
        size: height and width to crop to; by default the picture's, or all that the latent covers.
        mesh: see `text_to_image`.

    Raises:
        SamplingError: picture and mask do not fit the latents, or each other, or are of another type.
    """
    inputs: tuple[np.ndarray, ...] = ()
    if image is not None and mask is not None:
        mask = _check_pictures(image, mask, len(latent))
        size = size or image.shape[1:3]
        inputs = (np.asarray(images.to_float(image)), mask) if model.config.condition else ()
    return images.to_uint8(decode_float(model, latent, *inputs, size=size, mesh=mesh))


def decode_float(
    model: Autoencoder,
    latent: jax.Array | np.ndarray,
    pixels: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    size: tuple[int, int] | None = None,
    margin: int = 0,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """As `decode`, from and to floats in [-1, 1] (the result is not clipped).

    `mask` is float32, and `margin` is that of `inference.decode`.
    """
    z = inference.denormalize_latent(model, latent)
    return np.asarray(inference.decode(model, z, pixels, mask, size=size, margin=margin, mesh=mesh))


def check_size(unet: UNetConfig, autoencoder: ModelConfig, size: tuple[int, int]) -> None:
    """Raises SamplingError unless the networks can halve both sides (height, width) as often as they do."""
    multiple = unet.downsampling * autoencoder.downsampling
    if any(side < 1 or side % multiple for side in size):
        near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
        raise SamplingError(f"size {size[0]} x {size[1]}: expected multiples of {multiple} px, such as {near}")


def _check(pipeline: Pipeline, task: Task, count: int, seeds: Sequence[int], mesh: Mesh | None) -> None:
    """Raises SamplingError unless the pipeline is for the task, and the mesh can split `count` pictures with seeds."""
    if pipeline.task != task:
        raise SamplingError(f"the pipeline was loaded for {pipeline.task!r}; load it for {task!r}")
    if len(seeds) != count or not count:
        raise SamplingError(f"{count} pictures and {len(seeds)} seeds: expected one seed a picture, and at least one")
    if mesh is not None and count % mesh.size:
        raise SamplingError(f"{count} pictures cannot be split evenly over {mesh.size} devices")


def _check_pictures(image: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """The masks as float32; raises SamplingError unless there are `count` pictures, and masks of their size."""
    image, mask = np.asarray(image), np.asarray(mask)
    if image.ndim != 4 or image.shape[3] != 3 or mask.shape != (*image.shape[:3], 1) or len(image) != count:
        raise SamplingError(
            f"image {image.shape} and mask {mask.shape}: expected ({count}, h, w, 3) and ({count}, h, w, 1)"
        )
    if image.dtype != np.uint8:
        raise SamplingError(f"image of type {image.dtype}: expected uint8, of 0 to 255")
    if mask.dtype.kind not in "fiub" or not ((mask >= 0) & (mask <= 1)).all():
        raise SamplingError(
            f"mask of type {mask.dtype} with values from {mask.min()} to {mask.max()}: expected 0 (preserve) to "
            "1 (generate), or bool"
        )
    return mask.astype(np.float32)


@jitted
def _encode(encoder: TextEncoder | ImageEncoder, inputs: jax.Array) -> jax.Array:
    return encoder(inputs)


@jitted
def _encode_both(encoder: TextEncoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    return encoder.both(tokens)


def _texts(
    pipeline: Pipeline, prompts: Sequence[str], negative: str, shape: Sequence[int], *, guided: bool
) -> tuple[jax.Array, Added | None]:
    """(b, 2 or 1, n, d), nothing's features first; and for XL the pooled texts and the sizes, of latents of `shape`."""
    rows = [[negative, prompt] if guided else [prompt] for prompt in prompts]
    texts = [text for row in rows for text in row]
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    assert tokenizer is not None, "a pipeline that is loaded for this task has it"
    assert encoder is not None, "a pipeline that is loaded for this task has it"
    if pipeline.text_encoder_2 is None or pipeline.tokenizer_2 is None:
        features = _encode(encoder, jnp.asarray(tokenizer(texts)))
        return features.reshape(len(rows), -1, *features.shape[1:]), None
    first, _ = _encode_both(encoder, jnp.asarray(tokenizer(texts)))
    second, pooled = _encode_both(pipeline.text_encoder_2, jnp.asarray(pipeline.tokenizer_2(texts)))
    assert pooled is not None, "its projection was checked"
    features = jnp.concatenate([first, second], -1).reshape(
        len(rows), -1, first.shape[1], first.shape[2] + second.shape[2]
    )
    pooled = pooled.reshape(len(rows), -1, pooled.shape[-1])
    if guided and pipeline.zeros and not negative:
        features, pooled = features.at[:, 0].set(0), pooled.at[:, 0].set(0)
    height, width = (side * pipeline.autoencoder.config.downsampling for side in shape)
    # The original's size, where the crop begins, and the target's size.
    sizes = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
    return features, Added(pooled, jnp.broadcast_to(sizes, (*pooled.shape[:2], len(sizes))))


def _padded(pipeline: Pipeline, image: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Pictures as floats and masks at the latent's size, both padded so that the networks can halve them."""
    config = pipeline.autoencoder.config
    multiple = config.downsampling * pipeline.unet.config.downsampling
    region = np.asarray(inference.pad(np.where(mask > HAZE, mask, np.float32(0)), multiple))
    # Any masked pixel counts, so that a spot between the samples is painted too.
    small = reduce_mask(region, (region.shape[1] // config.downsampling, region.shape[2] // config.downsampling))
    return inference.pad(images.to_float(image), multiple), jnp.asarray(small)


def _encoded(pipeline: Pipeline, pixels: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The latents of pictures as the diffusion model scales them.

    The posterior's mode, where diffusers draws a sample: the result then depends on nothing but seed and input.
    """
    return inference.normalize_latent(pipeline.autoencoder, inference.encode(pipeline.autoencoder, pixels, mesh=mesh))


def _masked_latent(
    pipeline: Pipeline, image: np.ndarray, mask: np.ndarray, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """The latents of the pictures with grey under the mask, and the mask at the latent's size, 0 or 1."""
    hard = (mask > HAZE).astype(np.float32)
    pixels, small = _padded(pipeline, image, hard)
    region = inference.pad(hard, pipeline.autoencoder.config.downsampling * pipeline.unet.config.downsampling)
    return _encoded(pipeline, pixels * (1 - region), mesh), small


def _crop(pipeline: Pipeline, latent: jax.Array, image: np.ndarray) -> jax.Array:
    """Without what `_masked_latent` added to let the networks halve it."""
    height, width = (-(-side // pipeline.autoencoder.config.downsampling) for side in image.shape[1:3])
    return latent[:, :height, :width]


def keys_of(seeds: Sequence[int]) -> jax.Array:
    """(b,) keys, each of which depends on its seed alone."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def _noise(pipeline: Pipeline, seeds: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Each seed's own, so that a picture is the same in any batch."""
    channels = pipeline.autoencoder.config.latent_channels
    return jnp.stack([jax.random.normal(jax.random.key(seed), (*shape, channels)) for seed in seeds])


def _run(
    pipeline: Pipeline,
    batch: Batch,
    seeds: Sequence[int],
    guidance: float,
    steps: int,
    strength: float = 1.0,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`denoise` with the pipeline's sampler, the batch split over the mesh."""
    solver, scale, unet = make_solver(pipeline.scheduler, steps, strength), jnp.float32(guidance), pipeline.unet
    if solver.rows.noise is not None:
        batch = batch._replace(keys=keys_of(seeds))
    if mesh is not None:
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        solver, scale = jax.device_put((solver, scale), sharding.replicated(mesh))
        unet = inference.place(unet, mesh)
    # Flax 0.12 types a jitted function with options as a decorator.
    sample: Callable[..., jax.Array] = cast(Any, denoise)
    return sample(unet, solver, scale, batch, mesh=mesh)
