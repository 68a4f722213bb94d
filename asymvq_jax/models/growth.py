"""Grows a decoder into a wider and deeper one that computes the same (Net2Net, arXiv 1511.05641, with group norms).

Every channel of the wide decoder is a copy of one of the narrow one, in the same normalisation group. What reads a
channel divides its weight among the copies, so that sums stay what they were; the shares differ by noise that cancels,
so that copies get different gradients and part. With the same number of copies of every channel (x2) the groups'
statistics stay too, and the function is the same to rounding; else (x1.5) channels with more copies weigh more in them.
Added residual blocks, and attentions after them, end in a zero convolution and are the identity at first. Biases,
scales and the condition branch, if the narrow decoder has one, follow the same rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ConfigError
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.parameters import Params

# Standard deviation of the noise on the copies' shares, relative to the kernel's own.
NOISE = 0.1


def grow_decoder(narrow: ModelConfig, params: Params, wide: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The parameters of a decoder of the sizes of `wide` that computes what the narrow one does.

    Args:
        narrow: the sizes of the model that `params` belong to.
        params: its parameters, by name; only the decoder's are read.
        wide: the sizes to grow to.
        seed: of the noise that lets copies part.

    Returns:
        The decoder's parameters by name. Those of added residual blocks are left out, but for the zero convolutions
        that end them, and so is a condition branch that only `wide` has: they start at random.

    Raises:
        ConfigError: `wide` is narrower or shallower somewhere, or its residual blocks change their width elsewhere.
    """
    _check(narrow, wide)
    rng = np.random.default_rng(seed)
    grown = {}
    for name, shape in ((n, x.shape) for n, x in structure(wide)[1].items() if n.startswith("decoder.")):
        if name in params:
            grown[name] = _widen(np.asarray(params[name]), shape, narrow.norm_groups, rng)
            if ".query." in name:
                grown[name] *= _query_scale(params[name].shape[-1], shape[-1], narrow.norm_groups)
        elif ".conv2." in name or ".out." in name:
            grown[name] = np.zeros(shape, np.float32)
    return grown


def _query_scale(narrow: int, wide: int, groups: int) -> np.ndarray:
    """The factor of the queries that keeps attention scores.

    A product of queries and keys counts each channel as often as it was copied, and is divided by the width's root.
    """
    scale: np.ndarray = (wide / narrow) ** 0.5 / _copies(narrow, wide, groups)[1]
    return scale.astype(np.float32)


def _check(narrow: ModelConfig, wide: ModelConfig) -> None:
    def changes(config: ModelConfig) -> list[bool]:
        return [a == b for a, b in zip(config.decoder_channels, config.decoder_channels[1:], strict=False)]

    if (
        narrow.norm_groups != wide.norm_groups
        or (narrow.decoder_layers, wide.decoder_layers) != ("sd", "sd")
        or len(narrow.decoder_channels) != len(wide.decoder_channels)
        or any(w < n for n, w in zip(narrow.decoder_channels, wide.decoder_channels, strict=True))
        or wide.decoder_blocks < narrow.decoder_blocks
        or changes(narrow) != changes(wide)
        or (narrow.attention_levels, narrow.mid_attention) != (wide.attention_levels, wide.mid_attention)
    ):
        raise ConfigError(
            f"a decoder with model.decoder_channels={narrow.decoder_channels}, decoder_blocks={narrow.decoder_blocks}, "
            f"norm_groups={narrow.norm_groups} does not grow into one with {wide.decoder_channels}, "
            f"{wide.decoder_blocks}, {wide.norm_groups}: expected as many channels or more in every level, equal ones "
            "where they were equal, as many blocks or more, the same groups, attention in the same places, and "
            "decoder_layers='sd' in both"
        )


def _copies(narrow: int, wide: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `wide` channels, the narrow one that it copies, and how many copies that one has in all."""
    if narrow == wide:
        return np.arange(wide), np.ones(wide, np.int64)
    size = wide // groups
    inside = np.sort(np.arange(size) % (narrow // groups))
    source = (np.arange(groups)[:, None] * (narrow // groups) + inside).ravel()
    return source, np.bincount(source, minlength=narrow)[source]


def _widen(array: np.ndarray, shape: tuple[int, ...], groups: int, rng: np.random.Generator) -> np.ndarray:
    """Copies along the last axis (a kernel's outputs, a vector's channels), and shares out a kernel's inputs."""
    array = array[..., _copies(array.shape[-1], shape[-1], groups)[0]]
    if array.ndim == 4 and array.shape[2] != shape[2]:
        narrow = array.shape[2]
        source, count = _copies(narrow, shape[2], groups)
        noise = rng.normal(scale=NOISE * array.std(), size=shape)
        # Less its mean over each channel's copies, so that they sum to nothing.
        means = np.zeros(array.shape)
        where: Any = (slice(None), slice(None), source)
        np.add.at(means, where, noise / count[:, None])
        array = array[:, :, source] / count[:, None] + noise - means[:, :, source]
    return array.astype(np.float32)
