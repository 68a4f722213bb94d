"""What the benchmarks work on: random pictures, and one set of random weights for both sides."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asymvq_jax.config import Dtype, ModelConfig
from asymvq_jax.convert.convert import config_to_diffusers, convert
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import Params, merge, seeded, split


def pictures(config: ModelConfig, batch: int, size: int) -> dict[str, np.ndarray]:
    """Latents, images and masks, NHWC float32; the time depends on their shapes alone."""
    rng = np.random.default_rng(0)
    latent = size // config.downsampling
    return {
        "latent": rng.normal(size=(batch, latent, latent, config.latent_channels)).astype(np.float32),
        "image": rng.uniform(-1, 1, (batch, size, size, config.image_channels)).astype(np.float32),
        "mask": rng.integers(0, 2, (batch, size, size, 1)).astype(np.float32),
    }


def random_weights(config: ModelConfig, directory: Path) -> tuple[str, str]:
    """diffusers' own initialisation, as a model of ours and as a folder of diffusers'."""
    ours, theirs = directory / "ours", their_weights(config, directory)
    convert(theirs, ours)
    return str(ours), theirs


def their_weights(config: ModelConfig, directory: Path) -> str:
    """diffusers' own initialisation, as a folder of diffusers'."""
    from diffusers import AsymmetricAutoencoderKL

    theirs = directory / "theirs"
    AsymmetricAutoencoderKL.from_config(config_to_diffusers(config)).save_pretrained(theirs)
    return str(theirs)


def random_values(shapes: Params) -> Params:
    """Small random numbers for parameters of these shapes, made on the device, for models that are only timed."""
    key = jax.random.key(0)
    return {name: (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype) for name, x in shapes.items()}


def random_model(config: ModelConfig) -> Autoencoder:
    """A model to be timed."""
    graphdef, shapes = structure(config)
    return merge(graphdef, random_values(shapes))


def random_unet(config: UNetConfig, dtype: Dtype) -> UNet:
    """A UNet to be timed, with kernels in its compute type."""
    kind = jnp.dtype(dtype)
    graphdef, shapes = split(nnx.eval_shape(lambda: UNet(config, dtype=kind, rngs=seeded(0))))
    shapes = {n: jax.ShapeDtypeStruct(x.shape, kind if n.endswith(".kernel") else x.dtype) for n, x in shapes.items()}
    unet: UNet = merge(graphdef, random_values(shapes))
    return unet
