"""Encodes and decodes pictures that one device's memory cannot hold: layer by layer, each in strips of rows.

The feature maps lie in the host's memory, and the device holds one strip of one layer at a time. A strip comes with the
one row on either side that a 3x3 convolution reaches, and every group normalisation gets the statistics of the whole
picture, gathered while the layer before it was written. So the result is the whole model's but for the order of sums:
there is no seam, at no more arithmetic than without strips.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax.inference.whole import check_condition, check_pixels, pad
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.blocks import Attention, Conv, Norm, ResBlock, channel_moments
from asymvq_jax.models.decoder import Decoder, blend, grow, level_masks
from asymvq_jax.models.parameters import jitted
from asymvq_jax.models.tone import CELL, SHIFTS, Means, ToneField, beyond, enlarge, means, together

STRIP_PIXELS = 2**19


class FeatureMap(NamedTuple):
    """A whole feature map, (b, h, w, c) on the host, and its `channel_moments`."""

    values: np.ndarray
    moments: jax.Array | None


# `_sweep` with the size of its strips.
Sweep = Callable[..., FeatureMap]


class Condition(NamedTuple):
    """The condition branch's features and the masks to blend them by, outermost first."""

    features: list[np.ndarray]
    masks: list[np.ndarray]

    def outer(self, count: int) -> Condition:
        """The first of them."""
        return Condition(self.features[:count], self.masks[:count])


def encode_in_strips(model: Autoencoder, image: jax.Array | np.ndarray, strip_pixels: int = STRIP_PIXELS) -> jax.Array:
    """As `inference.encode`, in the host's memory but for a strip at a time; see `decode_in_strips`."""
    check_pixels(image, model.config)
    encoder, sweep = model.encoder, partial(_sweep, strip_pixels=strip_pixels)
    x = sweep(FeatureMap(np.asarray(pad(image, model.config.downsampling)), None), encoder.conv_in)
    for level in encoder.levels:
        for layer in level.layers():
            x = _layer(layer, x, None, sweep)
        if level.downsample is not None:
            x = sweep(x, level.downsample)
    return _latent_mode(model, jnp.asarray(x.values))


@jitted
def _latent_mode(model: Autoencoder, x: jax.Array) -> jax.Array:
    return model.latent(model.encoder.head(x)).mode()


def decode_in_strips(
    model: Autoencoder,
    latent: jax.Array | np.ndarray,
    image: jax.Array | np.ndarray | None = None,
    mask: jax.Array | np.ndarray | None = None,
    strip_pixels: int = STRIP_PIXELS,
    *,
    margin: int = 0,
) -> np.ndarray:
    """As `inference.decode`, in the host's memory but for a strip at a time.

    Args:
        model: the autoencoder.
        latent: (b, ceil(h / 8), ceil(w / 8), latent_channels); at this resolution everything is computed whole.
        image: (b, h, w, 3) in [-1, 1], of any size.
        mask: (b, h, w, 1), 1 = generate, 0 = preserve.
        strip_pixels: most pixels of a strip. At full resolution it takes about 4 * channels * 4 bytes a pixel.
        margin: see `Autoencoder.decode`.

    Returns:
        (b, h, w, 3) float32.

    Raises:
        InputError: a mask for a model without a condition branch.
    """
    decoder, sweep = model.decoder, partial(_sweep, strip_pixels=strip_pixels)
    condition: Condition | None = None
    size: tuple[int | None, int | None] = (None, None)
    if image is not None and mask is not None:
        check_condition(model.config)
        size = (image.shape[1], image.shape[2])
        pixels, region = (np.asarray(pad(x, model.config.downsampling)) for x in (image, mask))
        generated = np.asarray(grow(jnp.asarray(region), margin)) if margin else region
        features = _condition(decoder, pixels, generated, sweep)
        condition = Condition(features, level_masks(generated, len(features), decoder.mask_reduction))
    values, moments = latent_program(model, jnp.asarray(latent), *_innermost(condition))
    x = FeatureMap(np.asarray(values), moments)
    for i, level in enumerate(decoder.levels):
        # What the next level begins with is blended as it is written: where this level upsamples, with the feature of
        # the doubled resolution; after the last one, with the outermost.
        after = None if condition is None else condition.outer(len(decoder.levels) - i)
        layers = list(level.layers())
        for layer in layers:
            last = level.upsample is None and layer is layers[-1]
            x = _layer(layer, x, after if last else None, sweep)
        if level.upsample is not None:
            x = sweep(x, level.upsample, upsample=True, condition=after)
    result = sweep(x, decoder.conv_out, norm=decoder.norm_out).values.astype(np.float32)
    if decoder.tone is not None and condition is not None:
        result = _toned(decoder.tone, result, pixels, region, strip_pixels)
    return result[:, : size[0], : size[1]]


means_program = jax.jit(means)


@jitted
def field_program(tone: ToneField, found: Means) -> jax.Array:
    """The field of tone, whole, from means that were gathered in strips."""
    return tone.field(found)


def _toned(tone: ToneField, picture: np.ndarray, image: np.ndarray, mask: np.ndarray, strip_pixels: int) -> np.ndarray:
    """As `ToneField.__call__`, of whole pictures, (b, h, w, c), on the host."""
    side = 2 * CELL
    _, height, width, _ = picture.shape
    rows = max(side, strip_pixels // width // side * side)
    fields, weights = [], []
    for shift in SHIFTS:
        inputs = [np.pad(x, beyond(shift)) for x in (picture, image, mask, 1 - mask)]
        starts = range(0, height + shift, rows)
        found = [means_program(*(x[:, top : top + rows] for x in inputs)) for top in starts]
        joined = Means(*(jnp.concatenate(parts, 1) for parts in zip(*found, strict=True)))
        fields.append(field_program(tone, joined))
        weights.append(joined.edge().sum((1, 2, 3), keepdims=True))
    result = np.empty_like(picture)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # With the neighbouring cells, between which they are interpolated.
        parts = [
            _rows(field, top + s, bottom + s, side)[:, :, s:][:, :, :width]
            for field, s in zip(fields, SHIFTS, strict=True)
        ]
        result[:, top:bottom] = picture[:, top:bottom] + mask[:, top:bottom] * np.asarray(together(parts, weights))
    return result


def _rows(field: jax.Array, top: int, bottom: int, side: int) -> jax.Array:
    """Rows `top` to `bottom` of the enlarged field."""
    low, high = max(top // side - 1, 0), -(-bottom // side) + 1
    part = field[:, low:high]
    whole = enlarge(part, side, (part.shape[1] * side, part.shape[2] * side))
    return whole[:, top - low * side : bottom - low * side]


@jitted
def latent_program(
    model: Autoencoder, z: jax.Array, feature: jax.Array | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """What the decoder computes at the latent's resolution, blended, and the moments of its channels."""
    z = model.quantize(z)
    z = z if model.post_quant_conv is None else model.post_quant_conv(z)
    return _blended(model.decoder.mid(model.decoder.conv_in(z)), feature, mask)


def _blended(h: jax.Array, feature: jax.Array | None, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if feature is not None and mask is not None:
        h = blend(h, feature, mask.astype(h.dtype))
    return h, channel_moments(h)


def _condition(decoder: Decoder, image: np.ndarray, mask: np.ndarray, sweep: Sweep) -> list[np.ndarray]:
    assert decoder.condition is not None
    x = FeatureMap(decoder.condition_input(image, mask), None)
    features = []
    for i, layer in enumerate(decoder.condition.layers):
        x = sweep(x, layer, relu=i > 0)
        features.append(x.values)
    return features


def _innermost(condition: Condition | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The feature of the lowest resolution, and its mask."""
    if condition is None:
        return None, None
    return jnp.asarray(condition.features[-1]), jnp.asarray(condition.masks[-1])


def _layer(layer: ResBlock | Attention, x: FeatureMap, condition: Condition | None, sweep: Sweep) -> FeatureMap:
    if isinstance(layer, Attention):
        # Of the whole map, as at the latent's resolution: every pixel attends to all.
        values, moments = _attend(layer, jnp.asarray(x.values), *_innermost(condition))
        return FeatureMap(np.asarray(values), moments)
    h = sweep(x, layer.conv1, norm=layer.norm1)
    return sweep(h, layer.conv2, norm=layer.norm2, residual=x.values, shortcut=layer.shortcut, condition=condition)


@jitted
def _attend(
    attention: Attention, x: jax.Array, feature: jax.Array | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return _blended(attention(x), feature, mask)


def _sweep(
    x: FeatureMap,
    conv: Conv,
    *,
    strip_pixels: int,
    norm: Norm | None = None,
    relu: bool = False,
    upsample: bool = False,
    residual: np.ndarray | None = None,
    shortcut: Conv | None = None,
    condition: Condition | None = None,
) -> FeatureMap:
    """One convolution with what surrounds it, over the whole map: its input is normalised or rectified, or doubled;
    to its output a residual is added, and the condition's innermost feature blended in."""
    batch, height, width, _ = x.values.shape
    height, width = (2 * height, 2 * width) if upsample else (height // conv.stride, width // conv.stride)
    rows = max(2, strip_pixels // width // 2 * 2)
    values = np.empty((batch, height, width, conv.kernel.shape[-1]), conv.dtype)
    moments = jnp.zeros(())
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip, inside = _input_rows(x.values, top, bottom, conv, upsample)
        feature = mask = None
        if condition is not None:
            feature, mask = (each[-1][:, top:bottom] for each in condition)
        y, part = strip_program(
            conv, norm, shortcut, strip, x.moments if norm is not None else None, inside,
            None if residual is None else residual[:, top:bottom], feature, mask, relu=relu, upsample=upsample,
        )  # fmt: skip
        values[:, top:bottom] = y
        moments = moments + part * ((bottom - top) / height)
    return FeatureMap(values, moments)


def _input_rows(x: np.ndarray, top: int, bottom: int, conv: Conv, upsample: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `x` under the output's rows top to bottom, and which of them are inside the picture: (rows,) bool."""
    if upsample:
        low, high = top // 2 - 1, bottom // 2 + 1
    else:
        low = top * conv.stride - conv.padding[0]
        high = (bottom - 1) * conv.stride - conv.padding[0] + conv.kernel.shape[-4]
    rows = np.arange(low, high)
    inside = (rows >= 0) & (rows < x.shape[1])
    return x[:, rows.clip(0, x.shape[1] - 1)], inside


def _strip(
    conv: Conv,
    norm: Norm | None,
    shortcut: Conv | None,
    x: jax.Array,
    moments: jax.Array | None,
    inside: jax.Array,
    residual: jax.Array | None,
    feature: jax.Array | None,
    mask: jax.Array | None,
    *,
    relu: bool,
    upsample: bool,
) -> tuple[jax.Array, jax.Array]:
    """One layer of one strip of rows, and the moments of its channels."""
    if norm is not None and moments is not None:
        x = norm.normalize(x, moments)
    if relu:
        x = jax.nn.relu(x)
    # The convolution pads what comes after the normalisation with zeros.
    x = jnp.where(inside[None, :, None, None], x, jnp.zeros((), x.dtype))
    # A doubled strip has two rows at either end that are its neighbours'.
    y = conv(x)[:, 2:-2] if upsample else conv.apply(x, row_padding=(0, 0))
    if residual is not None:
        y = y + (residual if shortcut is None else shortcut(residual))
    return _blended(y, feature, mask)


# One layer of one strip, jitted.
strip_program: Callable[..., tuple[jax.Array, jax.Array]] = jitted(_strip, static_argnames=("relu", "upsample"))
