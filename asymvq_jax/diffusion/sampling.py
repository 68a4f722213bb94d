"""From texts, pictures and masks to latents: the denoising loop, and what each task feeds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.devices import sharding
from asymvq_jax.diffusion.clip import ImageEncoder, TextEncoder, prepare_example
from asymvq_jax.diffusion.pipeline import Pipeline, Task
from asymvq_jax.diffusion.schedulers import History, Solver, advance, begin, make_solver
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.errors import SamplingError
from asymvq_jax.files import images
from asymvq_jax.files.masks import HAZE, reduce_mask
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import Params, merge, split


@partial(nnx.jit, static_argnames="mesh")
def denoise(
    unet: UNet,
    solver: Solver,
    noise: jax.Array,
    context: jax.Array,
    fixed: jax.Array | None,
    guidance: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The whole loop of a sampler.

    Args:
        unet: the network.
        solver: the sampler's table.
        noise: (b, h, w, c) float32 of variance 1.
        context: (b, 2, n, d): the features of nothing, and those of the condition; or (b, 1, n, d) without guidance.
        fixed: (b, h, w, k), what the network sees beside the noisy latent; None for text-to-image.
        guidance: by how much the condition's prediction is exaggerated over that of nothing.
        mesh: splits the batch; each device has the whole network and needs nothing from the others.

    Returns:
        (b, h, w, c) float32, as a diffusion model scales latents.
    """
    graphdef, params = split(unet)

    def loop(
        params: Params,
        solver: Solver,
        guidance: jax.Array,
        noise: jax.Array,
        context: jax.Array,
        fixed: jax.Array | None,
    ) -> jax.Array:
        predict = merge(graphdef, params)
        batch, ways = context.shape[:2]
        context = context.reshape(batch * ways, *context.shape[2:])

        def step(history: History, row: Solver) -> tuple[History, None]:
            x = history.samples[0]
            x = x if fixed is None else jnp.concatenate([x, fixed], -1)
            output = predict(jnp.repeat(x, ways, 0), jnp.full(batch * ways, row.timesteps), context)
            output = output.reshape(batch, ways, *output.shape[1:])
            if ways == 2:
                output = output[:, :1] + guidance * (output[:, 1:] - output[:, :1])
            return advance(row, history, output[:, 0]), None

        history, _ = jax.lax.scan(step, begin(solver, noise), solver)
        return history.samples[0]

    if mesh is not None:
        # Not left to XLA, which cannot split the attention's kernels.
        whole, part = PartitionSpec(), PartitionSpec(sharding.BATCH_AXES)
        places = (whole, whole, whole, part, part, part)
        loop = jax.shard_map(loop, mesh=mesh, in_specs=places, out_specs=part, check_vma=False)
    return loop(params, solver, guidance, noise, context, fixed)


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
    context = _texts(pipeline, prompts, negative, guided=guidance > 1)
    return _run(pipeline, shape, seeds, context, None, guidance, steps, mesh)


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
    mesh: Mesh | None = None,
) -> jax.Array:
    """Latents of pictures whose masked region a text describes; arguments as in `text_to_image`, and:

    Args:
        pipeline: loaded for "inpaint".
        image: (b, h, w, 3) uint8, of any size.
        mask: (b, h, w, 1); bool, or numbers in [0, 1]; what is above 0 is generated.
        prompts, seeds, negative, guidance, steps, mesh: see `text_to_image`.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), c) float32.

    Raises:
        SamplingError: as `text_to_image`; or pictures and masks that do not fit.
    """
    _check(pipeline, "inpaint", len(prompts), seeds, mesh)
    masked, small = _masked_latent(pipeline, image, mask, len(seeds), mesh)
    context = _texts(pipeline, prompts, negative, guided=guidance > 1)
    latent = _run(
        pipeline, masked.shape[1:3], seeds, context, jnp.concatenate([small, masked], -1), guidance, steps, mesh
    )
    return _crop(pipeline, latent, image)


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
    masked, small = _masked_latent(pipeline, image, mask, len(seeds), mesh)
    encoder, preparation = pipeline.image_encoder, pipeline.example
    assert encoder is not None, "a pipeline that is loaded for this task has it"
    assert preparation is not None, "a pipeline that is loaded for this task has it"
    features = _encode(encoder, jnp.stack([prepare_example(example, preparation) for example in examples]))[:, None]
    if guidance > 1:
        nothing = jnp.broadcast_to(encoder.unconditional[...].astype(features.dtype)[None], features.shape)
        features = jnp.concatenate([nothing, features], 1)
    # Paint-by-Example's mask is of the other polarity and comes last.
    fixed = jnp.concatenate([masked, 1 - small], -1)
    return _crop(pipeline, _run(pipeline, masked.shape[1:3], seeds, features, fixed, guidance, steps, mesh), image)


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


@nnx.jit
def _encode(encoder: TextEncoder | ImageEncoder, inputs: jax.Array) -> jax.Array:
    return encoder(inputs)


def _texts(pipeline: Pipeline, prompts: Sequence[str], negative: str, *, guided: bool) -> jax.Array:
    """(b, 2 or 1, n, d); nothing's features come first."""
    rows = [[negative, prompt] if guided else [prompt] for prompt in prompts]
    assert pipeline.tokenizer is not None, "a pipeline that is loaded for this task has it"
    assert pipeline.text_encoder is not None, "a pipeline that is loaded for this task has it"
    tokens = pipeline.tokenizer([text for row in rows for text in row])
    features = _encode(pipeline.text_encoder, jnp.asarray(tokens))
    return features.reshape(len(rows), -1, *features.shape[1:])


def _masked_latent(
    pipeline: Pipeline, image: np.ndarray, mask: np.ndarray, count: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """The latent of the picture with grey under the mask, scaled, and the mask at the latent's size.

    The posterior's mode, where diffusers draws a sample: the result then depends on nothing but seed and input.
    """
    hard = (_check_pictures(image, mask, count) > HAZE).astype(np.float32)
    config = pipeline.autoencoder.config
    multiple = config.downsampling * pipeline.unet.config.downsampling
    region = np.asarray(inference.pad(hard, multiple))
    masked = inference.pad(images.to_float(image), multiple) * (1 - region)
    # Any masked pixel counts, so that a spot between the samples is painted too.
    small = reduce_mask(region, (region.shape[1] // config.downsampling, region.shape[2] // config.downsampling))
    latent = inference.normalize_latent(pipeline.autoencoder, inference.encode(pipeline.autoencoder, masked, mesh=mesh))
    return latent, jnp.asarray(small)


def _crop(pipeline: Pipeline, latent: jax.Array, image: np.ndarray) -> jax.Array:
    """Without what `_masked_latent` added to let the networks halve it."""
    height, width = (-(-side // pipeline.autoencoder.config.downsampling) for side in image.shape[1:3])
    return latent[:, :height, :width]


def _run(
    pipeline: Pipeline,
    shape: Sequence[int],
    seeds: Sequence[int],
    context: jax.Array,
    fixed: jax.Array | None,
    guidance: float,
    steps: int,
    mesh: Mesh | None,
) -> jax.Array:
    """`denoise` from the seeds' noise, the batch split over the mesh."""
    channels = pipeline.autoencoder.config.latent_channels
    noise = jnp.stack([jax.random.normal(jax.random.key(seed), (*shape, channels)) for seed in seeds])
    solver = make_solver(pipeline.scheduler, steps)
    scale = jnp.float32(guidance)
    unet = pipeline.unet
    if mesh is not None:
        noise, context, fixed = jax.device_put((noise, context, fixed), sharding.batch_sharding(mesh))
        solver, scale = jax.device_put((solver, scale), sharding.replicated(mesh))
        unet = inference.place(unet, mesh)
    # Flax 0.12 types a jitted function with options as a decorator.
    sample: Callable[..., jax.Array] = cast(Any, denoise)
    return sample(unet, solver, noise, context, fixed, scale, mesh=mesh)
