"""A beginning from which a small autoencoder learns at once: a wavelet transform through its shortcuts.

At random, a first stage spends thousands of steps until colour reaches the latent: it has to pass the normalisations,
which take away means and contrast, and a dozen convolutions that each shrink it. Here the residual branches begin as
zero, and what is left, convolutions and shortcuts, as a linear transform: the latent's channels are luminance and both
colour differences of 8 x 8 pixels (Stable Diffusion's size) and luminance's lowest frequencies, which is near the
best linear code of photographs; the decoder interpolates the colours linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.parameters import Params

# Luminance and colour differences (JPEG's) from red, green and blue.
_COLOURS = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
# Of 2 x 2 pixels: mean, differences between columns, rows and diagonals.
_MEAN = np.full((2, 2), 0.25)
_ACROSS = np.array([[1, -1], [1, -1]]) / 4
_DOWN = _ACROSS.T
_DIAGONAL = np.array([[1, -1], [-1, 1]]) / 4
# What each channel of a stride-2 convolution takes from which: the last, and the one before. All others hand on means.
_MEANS = [(0, _MEAN), (1, _MEAN), (2, _MEAN)]
_SECOND_LAST = [*_MEANS, (0, _ACROSS), (0, _DOWN)]
_LAST = [*_SECOND_LAST, (0, _DIAGONAL), (3, _ACROSS), (4, _DOWN)]
# The latent's channels in this order, each times its factor, have about unit variance on photographs.
_FACTORS = (2.0, 8.0, 8.0, 8.0, 8.0, 12.0, 12.0, 12.0)
# Linear interpolation, as a convolution of the nearest doubling.
_LINEAR = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
# Under the last normalisations each channel of the transform stands beside its negative, on constants that are larger
# and of either sign by pairs: so a group's mean is zero and its variance nearly constant, and neither takes a picture's
# tone or contrast away. Behind them, SiLU's slope where the constants lie.
_CONSTANT = 2.0
_MIDDLE, _SLOPE = 2.0, 1.0908
# Random channels beside the transform's, in shares of unit variance.
_FIRST_SHARE, _SHORTCUT_SHARE = 0.3, 0.5


def wavelet(params: Params, config: ModelConfig, log_variance: float) -> Params:
    """Parameters that compute a wavelet transform and linear interpolation beside their random channels.

    Args:
        params: an autoencoder's, at random as the reference's.
        config: its sizes, which `Config` has checked.
        log_variance: the posterior's, to begin with.

    Returns:
        New parameters by the same names.
    """
    result = {name: _base(name, np.shape(value), value) for name, value in params.items()}
    _encoder(result, config, log_variance)
    _decoder(result, config)
    return result


def _base(name: str, shape: tuple[int, ...], value: jnp.ndarray) -> jnp.ndarray:
    """Kernels of unit gain, residual branches that end in zero, and no biases."""
    module, leaf = name.rsplit(".", 1)
    if "norm" in module:
        return value
    if leaf == "bias" or module.endswith(("conv2", "attention.out")):
        return jnp.zeros(shape)
    share = _FIRST_SHARE if module == "encoder.conv_in" else _SHORTCUT_SHARE if module.endswith("shortcut") else 1.0
    # The reference's are uniform with a third of the variance that keeps a signal's.
    return value * (share * 3**0.5)


def _encoder(params: Params, config: ModelConfig, log_variance: float) -> None:
    latent, last = config.latent_channels, len(config.encoder_channels) - 1
    _read(params, "encoder.conv_in", [[(i, w, 1) for i, w in enumerate(row)] for row in _COLOURS])
    channels = len(_MEANS)
    for level in range(last):
        _hand_on(params, f"encoder.levels.{level}.blocks.0.shortcut", channels)
        taps = {last - 1: _LAST, last - 2: _SECOND_LAST}.get(level, _MEANS)
        signs = (1, -1) if level == last - 1 else (1,)
        outputs = [[(i, sign * pattern, 0)] for i, pattern in taps for sign in signs]
        _read(params, f"encoder.levels.{level}.downsample", outputs)
        channels = len(outputs)
    _hand_on(params, f"encoder.levels.{last}.blocks.0.shortcut", channels)
    _through_norm(params, "encoder", "encoder.mid.block2.conv2", _FACTORS[:latent])
    if config.quant_conv:
        _hand_on(params, "quant_conv", latent)
        _hand_on(params, "post_quant_conv", latent)
        params["quant_conv.kernel"] *= (np.arange(2 * latent) < latent).astype(np.float32)[None, None, None]
    last_bias = "quant_conv.bias" if config.quant_conv else "encoder.conv_out.bias"
    params[last_bias] = jnp.repeat(jnp.array([0.0, log_variance]), latent)


def _decoder(params: Params, config: ModelConfig) -> None:
    last, used = len(config.decoder_channels) - 1, min(config.latent_channels, 3)
    back = np.linalg.inv(_COLOURS)[:, :used] / np.array(_FACTORS[:used])
    pairs = [sign * row for row in back for sign in (1, -1)]
    _read(params, "decoder.conv_in", [[(i, w, 1) for i, w in enumerate(row)] for row in pairs])
    for level in range(last + 1):
        _hand_on(params, f"decoder.levels.{level}.blocks.0.shortcut", len(pairs))
        if level < last:
            _read(params, f"decoder.levels.{level}.upsample", [[(i, _LINEAR, 0)] for i in range(len(pairs))])
    final = f"decoder.levels.{last}.blocks.{config.decoder_blocks}.conv2"
    _through_norm(params, "decoder", final, [1.0] * len(back))


def _read(params: Params, name: str, outputs: Sequence[Sequence[tuple[int, Any, int]]]) -> None:
    """The first outputs of a convolution, each from (input, weight or pattern of weights, where it begins) alone."""
    name = f"{name}.kernel"
    # In NumPy: dozens of small updates would take XLA minutes to compile.
    fixed = np.zeros(params[name].shape, np.float32)
    for output, taps in enumerate(outputs):
        for source, pattern, begin in taps:
            pattern = np.atleast_2d(pattern)
            rows, columns = (slice(begin, begin + n) for n in pattern.shape)
            fixed[rows, columns, source, output] = pattern
    others = np.arange(fixed.shape[-1]) >= len(outputs)
    params[name] = params[name] * others.astype(np.float32)[None, None, None] + fixed


def _hand_on(params: Params, name: str, channels: int) -> None:
    """The first channels of a 1x1 convolution, where there is one, unchanged."""
    if f"{name}.kernel" in params:
        _read(params, name, [[(i, 1.0, 0)] for i in range(channels)])


def _through_norm(params: Params, half: str, before: str, factors: Sequence[float]) -> None:
    """The first pairs of channels through the last normalisation and SiLU of a half and out, each times its factor."""
    width = params[f"{before}.bias"].shape[0]
    signs = np.where(np.arange(width) // 2 % 2 == 0, 1, -1).astype(np.float32)
    params[f"{before}.bias"] = jnp.asarray(_CONSTANT * signs)
    params[f"{half}.norm_out.bias"] = jnp.asarray(_MIDDLE - signs)
    weights = [factor * _CONSTANT / (2 * _SLOPE) for factor in factors]
    kernel = np.zeros(params[f"{half}.conv_out.kernel"].shape, np.float32)
    for i, weight in enumerate(weights):
        kernel[1, 1, 2 * i : 2 * i + 2, i] = weight, -weight
    params[f"{half}.conv_out.kernel"] = jnp.asarray(kernel)
