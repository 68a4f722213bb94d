"""From texts, pictures and masks to latents: the denoising loop, and what each task feeds it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from asymvq_jax import images, inference, sharding
from asymvq_jax.config import UserError
from asymvq_jax.diffusion.clip import ImageEncoder, TextEncoder, prepare_example
from asymvq_jax.diffusion.pipeline import Pipeline
from asymvq_jax.diffusion.schedulers import Solver, advance, begin, make_solver
from asymvq_jax.diffusion.unet import UNet
from asymvq_jax.models.autoencoder import Autoencoder


class SamplingError(UserError):
    """What is asked for does not fit the pipeline; the message gives the sizes."""


@nnx.jit
def denoise(
    unet: UNet, solver: Solver, noise: jax.Array, context: jax.Array, fixed: jax.Array | None, guidance: jax.Array
) -> jax.Array:
    """The whole loop of a sampler.

    Args:
        unet: the network.
        solver: the sampler's table.
        noise: (b, h, w, c) float32 of variance 1.
        context: (b, 2, n, d): the features of nothing, and those of the condition; or (b, 1, n, d) without guidance.
        fixed: (b, h, w, k), what the network sees beside the noisy latent; None for text-to-image.
        guidance: by how much the condition's prediction is exaggerated over that of nothing.

    Returns:
        (b, h, w, c) float32, as a diffusion model scales latents.
    """
    batch, ways = context.shape[:2]
    context = context.reshape(batch * ways, *context.shape[2:])

    def step(history: tuple, row: Solver) -> tuple:
        x = history.samples[0]
        x = x if fixed is None else jnp.concatenate([x, fixed], -1)
        # Beside each other, so that both predictions of a picture are made on its device.
        output = unet(jnp.repeat(x, ways, 0), jnp.full(batch * ways, row.timesteps), context)
        output = output.reshape(batch, ways, *output.shape[1:])
        if ways == 2:
            output = output[:, :1] + guidance * (output[:, 1:] - output[:, :1])
        return advance(row, history, output[:, 0]), None

    history, _ = jax.lax.scan(step, begin(solver, noise), solver)
    return history.samples[0]


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
        mesh: splits the batch; it has to be a multiple of the devices.

    Returns:
        (b, h / 8, w / 8, c) float32, scaled as a diffusion model has them (`decode` takes them).

    Raises:
        SamplingError: a size that the networks cannot halve so often.
    """
    check_size(pipeline, size)
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
        mask: (b, h, w, 1), 0 or 1; 1 = generate.
        prompts, seeds, negative, guidance, steps, mesh: see `text_to_image`.

    Returns:
        (b, ceil(h / 8), ceil(w / 8), c) float32.
    """
    masked, small = _masked_latent(pipeline, image, mask)
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
    """
    masked, small = _masked_latent(pipeline, image, mask)
    encoder = pipeline.image_encoder
    features = _encode(encoder, jnp.stack([prepare_example(example, pipeline.example) for example in examples]))[
        :, None
    ]
    if guidance > 1:
        nothing = jnp.broadcast_to(encoder.unconditional[...].astype(features.dtype)[None], features.shape)
        features = jnp.concatenate([nothing, features], 1)
    # Paint-by-Example's mask is of the other polarity and comes last.
    fixed = jnp.concatenate([masked, 1 - small], -1)
    return _crop(pipeline, _run(pipeline, masked.shape[1:3], seeds, features, fixed, guidance, steps, mesh), image)


def decode(
    model: Autoencoder, latent: jax.Array, image: np.ndarray | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    """Pictures, (b, h, w, 3) uint8, of the latents that this module's functions return.

    Args:
        model: the autoencoder whose decoder is to be used; without condition branch, picture and mask are not seen.
        latent: (b, h / 8, w / 8, c).
        image: (b, h, w, 3) uint8, the pictures whose pixels are to be kept where the mask is 0.
        mask: (b, h, w, 1).
    """
    config = model.config
    z = latent / config.scaling_factor + config.shift_factor
    if image is None or mask is None:
        return images.to_uint8(inference.decode(model, z))
    if not config.condition:
        return images.to_uint8(inference.decode(model, z, size=image.shape[1:3]))
    return images.to_uint8(inference.decode(model, z, images.to_float(image), mask.astype(np.float32)))


def check_size(pipeline: Pipeline, size: tuple[int, int]) -> None:
    """Raises SamplingError unless the networks can halve both sides (height, width) as often as they do."""
    multiple = _multiple(pipeline)
    if any(side < 1 or side % multiple for side in size):
        near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in size)
        raise SamplingError(f"size {size[0]} x {size[1]}: expected multiples of {multiple} px, such as {near}")


def _multiple(pipeline: Pipeline) -> int:
    return pipeline.autoencoder.config.downsampling * pipeline.unet.config.downsampling


@nnx.jit
def _encode(encoder: TextEncoder | ImageEncoder, inputs: jax.Array) -> jax.Array:
    return encoder(inputs)


def _texts(pipeline: Pipeline, prompts: Sequence[str], negative: str, *, guided: bool) -> jax.Array:
    """(b, 2 or 1, n, d); nothing's features come first."""
    rows = [[negative, prompt] if guided else [prompt] for prompt in prompts]
    tokens = pipeline.tokenizer([text for row in rows for text in row])
    features = _encode(pipeline.text_encoder, jnp.asarray(tokens))
    return features.reshape(len(rows), -1, *features.shape[1:])


def _masked_latent(pipeline: Pipeline, image: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The latent of the picture with grey under the mask, scaled, and the mask at the latent's size.

    The posterior's mode, where diffusers draws a sample: the result then depends on nothing but seed and input.
    """
    config, multiple = pipeline.autoencoder.config, _multiple(pipeline)
    mask = inference.pad(mask.astype(np.float32), multiple)
    masked = inference.pad(images.to_float(image), multiple) * (mask < 0.5).astype(jnp.float32)
    latent = (inference.encode(pipeline.autoencoder, masked) - config.shift_factor) * config.scaling_factor
    return latent, mask[:, :: config.downsampling, :: config.downsampling]


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
    solver = Solver(*map(jnp.asarray, make_solver(pipeline.scheduler, steps)))
    scale = jnp.float32(guidance)
    unet = pipeline.unet
    if mesh is not None:
        noise, context, fixed = jax.device_put((noise, context, fixed), sharding.batch_sharding(mesh))
        solver, scale = jax.device_put((solver, scale), sharding.replicated(mesh))
        unet = inference.place(unet, mesh)
    return denoise(unet, solver, noise, context, fixed, scale)
