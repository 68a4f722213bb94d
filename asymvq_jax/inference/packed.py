"""A latent with an axis of frames, as video models keep pictures, or packed into tokens, as FLUX and Qwen-Image do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError

Array = npt.NDArray[np.floating]

# Pixels of the latent, along each side, that are one token where the model itself has no patches.
TOKEN = 2
# No diffusion model of fewer channels packs its latents.
LEAST_CHANNELS = 16


def without_frames(array: Array, config: ModelConfig) -> Array:
    """(b, c, 1, h, w), (b, 1, h, w, c) or (c, 1, h, w) without the axis of frames; anything else as it is.

    Raises:
        InputError: there are several frames.
    """
    channels = {config.latent_channels, config.latent_channels * config.latent_patch**2}
    if array.ndim == 5:
        axis = 2 if array.shape[1] in channels else 1
    elif array.ndim == 4 and array.shape[0] in channels and array.shape[1] == 1 and config.latent_channels > 1:
        axis = 1
    else:
        return array
    if array.shape[axis] != 1:
        raise InputError(
            f"the latent has shape {array.shape}, {array.shape[axis]} frames of a video: expected one, a picture's"
        )
    return array.squeeze(axis)


def token_shape(config: ModelConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Rows and columns of a picture's tokens, and their channels.

    Args:
        config: the model's.
        size: height and width of the picture.
    """
    side = max(config.latent_patch, TOKEN)
    rows, columns = (-(-length // (config.downsampling * side)) for length in size)
    return rows, columns, config.latent_channels * side**2


def describe_tokens(array: Array, config: ModelConfig, size: tuple[int, int]) -> str:
    """Such as "; or packed into tokens (16, 64)", where an array may be that but is of another picture; else ""."""
    rows, columns, channels = token_shape(config, size)
    return f"; or packed into tokens {(rows * columns, channels)}" if looks_packed(array, config) else ""


def looks_packed(array: Array, config: ModelConfig) -> bool:
    """Whether an array may be (tokens, channels) or (b, tokens, channels); the picture's size decides."""
    channels = token_shape(config, (1, 1))[2]
    return config.latent_channels >= LEAST_CHANNELS and array.ndim in (2, 3) and array.shape[-1] == channels


def unpack(array: Array, config: ModelConfig, size: tuple[int, int]) -> Array | None:
    """Tokens, as diffusers' pipelines of FLUX, FLUX.2 and Qwen-Image return them, laid out as a latent.

    Args:
        array: (tokens, channels) or (b, tokens, channels), each the channels (channel, row, column) of a square.
        config: the model's.
        size: height and width of the picture.

    Returns:
        (b, h, w, c) of a model without patches, or (b, h / p, w / p, c * p**2) of one with patches of p; None where
        the array is not the picture's tokens.
    """
    rows, columns, channels = token_shape(config, size)
    if not looks_packed(array, config) or array.shape[-2] != rows * columns:
        return None
    grid = array.reshape(-1, rows, columns, channels)
    if config.latent_patch > 1:
        return grid
    latent = grid.reshape(-1, rows, columns, channels // TOKEN**2, TOKEN, TOKEN).transpose(0, 1, 4, 2, 5, 3)
    latent = latent.reshape(-1, rows * TOKEN, columns * TOKEN, channels // TOKEN**2)
    # Tokens may reach beyond the picture.
    height, width = (-(-length // config.downsampling) for length in size)
    return latent[:, :height, :width]
