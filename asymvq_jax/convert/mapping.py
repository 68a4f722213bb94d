"""The one table of weight names, read in both directions: ours, diffusers', and the original checkpoints' (LDM)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.stored import Shaped
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import merge, split

Format = Literal["diffusers", "ldm"]
# The one tensor that PyTorch holds as an integer.
BATCHES = "bn.num_batches_tracked"


class Row(NamedTuple):
    """One kind of layer under its names; {i} is the level, {u} the level counted from the other end.

    Where an encoder is a list of all its levels' layers, {f} is the place in there, and {d} that of what ends a level.
    """

    ours: str
    diffusers: str
    ldm: str
    # diffusers' names in Wan's and Qwen-Image's autoencoders; by default as in the others.
    wan: str = ""


def _block(ours: str, diffusers: str, ldm: str, wan: str = "") -> list[Row]:
    wan = wan or diffusers
    same = ("norm1", "conv1", "norm2", "conv2")
    return [
        *(Row(f"{ours}.{n}", f"{diffusers}.{n}", f"{ldm}.{n}", f"{wan}.{n}") for n in same),
        Row(f"{ours}.shortcut", f"{diffusers}.conv_shortcut", f"{ldm}.nin_shortcut", f"{wan}.conv_shortcut"),
    ]


def _attention(*prefixes: str) -> list[Row]:
    inside = [
        ("norm", "group_norm", "norm", "norm"),
        ("query", "to_q", "q", ""),
        ("key", "to_k", "k", ""),
        ("value", "to_v", "v", ""),
        ("qkv", "", "", "to_qkv"),
        ("out", "to_out.0", "proj_out", "proj"),
    ]
    prefixes = (*prefixes, prefixes[1])
    return [Row(*(f"{prefix}.{name}" for prefix, name in zip(prefixes, names, strict=True))) for names in inside]


def _half(half: str) -> list[Row]:
    return [
        Row(f"{half}.conv_in", f"{half}.conv_in", f"{half}.conv_in"),
        *_block(f"{half}.mid.block1", f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"),
        *_attention(f"{half}.mid.attention", f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"),
        *_block(f"{half}.mid.block2", f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"),
        Row(f"{half}.norm_out", f"{half}.conv_norm_out", f"{half}.norm_out", f"{half}.norm_out"),
        Row(f"{half}.conv_out", f"{half}.conv_out", f"{half}.conv_out"),
    ]


TABLE: list[Row] = [
    *_half("encoder"),
    *_block(
        "encoder.levels.{i}.blocks.{j}",
        "encoder.down_blocks.{i}.resnets.{j}",
        "encoder.down.{i}.block.{j}",
        "encoder.down_blocks.{f}",
    ),
    *_attention(
        "encoder.levels.{i}.attentions.{j}", "encoder.down_blocks.{i}.attentions.{j}", "encoder.down.{i}.attn.{j}"
    ),
    Row(
        "encoder.levels.{i}.downsample",
        "encoder.down_blocks.{i}.downsamplers.0.conv",
        "encoder.down.{i}.downsample.conv",
        "encoder.down_blocks.{d}.resample.1",
    ),
    Row("encoder.levels.{i}.over_time", "", "", "encoder.down_blocks.{d}.time_conv"),
    Row("quant_conv", "quant_conv", "quant_conv"),
    Row("codebook", "quantize.embedding", "quantize.embedding"),
    Row("statistics.mean", "bn.running_mean", "bn.running_mean"),
    Row("statistics.variance", "bn.running_var", "bn.running_var"),
    Row("statistics.count", BATCHES, BATCHES),
    Row("post_quant_conv", "post_quant_conv", "post_quant_conv"),
    *_half("decoder"),
    *_block("decoder.levels.{i}.blocks.{j}", "decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{u}.block.{j}"),
    *_attention("decoder.levels.{i}.attentions.{j}", "decoder.up_blocks.{i}.attentions.{j}", "decoder.up.{u}.attn.{j}"),
    Row(
        "decoder.levels.{i}.upsample",
        "decoder.up_blocks.{i}.upsamplers.0.conv",
        "decoder.up.{u}.upsample.conv",
        "decoder.up_blocks.{i}.upsamplers.0.resample.1",
    ),
    Row("decoder.levels.{i}.over_time", "", "", "decoder.up_blocks.{i}.upsamplers.0.time_conv"),
    Row("decoder.condition.layers.{i}", "decoder.condition_encoder.layers.{i}", "decoder.encoder.layers.{i}"),
]


class Weight(NamedTuple):
    """One parameter: its name in our model, its shape there, and its name and shape in a PyTorch file."""

    path: str
    shape: tuple[int, ...]
    name: str
    torch_shape: tuple[int, ...]


def weights(config: ModelConfig, form: Format) -> list[Weight]:
    """All parameters of the model that `config` describes, with their names in `form`."""
    return list(_weights(config, form))


@functools.cache
def _weights(config: ModelConfig, form: Format) -> tuple[Weight, ...]:
    if config.tone_field:
        raise ConvertError(
            "the model has a field of tone beside its decoder (model.tone_field=True), which PyTorch's formats have no "
            "place for: expected a model without it, such as tiny-paper for tiny"
        )
    levels, wan = len(config.encoder_channels), config.encoder_layers != "sd"
    per_level = config.encoder_blocks + 1

    def derive(indices: dict[str, int]) -> dict[str, int]:
        i, j = (indices.get(name, 0) for name in "ij")
        return {"u": levels - 1 - i, "f": i * per_level + j, "d": i * per_level + config.encoder_blocks}

    named = name_parameters(structure(config)[1], TABLE, "wan" if wan else form, derive)
    if wan:
        return tuple(w._replace(torch_shape=_gamma_shape(w)) if w.path.endswith(".gamma") else w for w in named)
    if form == "ldm":
        return tuple(named)
    # diffusers' attention has linear layers where ours and the original have 1x1 convolutions.
    return tuple(w._replace(torch_shape=w.torch_shape[:2]) if ".attentions." in w.name else w for w in named)


def _gamma_shape(weight: Weight) -> tuple[int, ...]:
    """A norm's channels with an axis of length 1 for each that its input has besides: within attention no time."""
    return (*weight.torch_shape, *[1] * (2 if ".attentions." in weight.name else 3))


def name_parameters(
    params: Mapping[str, Shaped],
    table: Sequence[Row],
    form: str,
    derive: Callable[[dict[str, int]], dict[str, int]] = lambda indices: {},
) -> list[Weight]:
    """The names and shapes that parameters have in a PyTorch file.

    Args:
        params: (abstract) arrays by our names: layers' kernel, scale, embedding and bias, or arrays of their own.
        table: rows of layers, by their name without the last part, and of arrays of their own, by their whole name.
        form: the field of Row to read.
        derive: from the indices of a name ({i}, {j}), the others that the names in `form` have.
    """
    patterns = [(re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(row.ours))), row) for row in table]
    result = []
    for path, leaf in params.items():
        layer, _, kind = path.rpartition(".")
        suffix = f".{kind}" if kind in ("bias", "gamma") else ".weight"
        name = _name(path, patterns, form, derive) or _name(layer, patterns, form, derive, suffix)
        if name is None:
            raise KeyError(f"no row for {path}")
        result.append(Weight(path, tuple(leaf.shape), name, _torch_shape(tuple(leaf.shape), kind)))
    return result


def _name(
    ours: str,
    patterns: Sequence[tuple[re.Pattern[str], Row]],
    form: str,
    derive: Callable[[dict[str, int]], dict[str, int]],
    suffix: str = "",
) -> str | None:
    for pattern, row in patterns:
        if match := pattern.fullmatch(ours):
            indices = {k: int(v) for k, v in match.groupdict().items()}
            return str(getattr(row, form) or row.diffusers).format(**indices, **derive(indices)) + suffix
    return None


def _torch_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if kind != "kernel":
        return shape
    *window, inputs, outputs = shape
    return (outputs, inputs, *window)


def to_torch(weight: Weight, array: np.ndarray) -> np.ndarray:
    """A parameter in PyTorch's layout: a kernel (h, w, in, out) becomes (out, in, h, w), and (in, out) (out, in)."""
    if weight.path.endswith(".kernel"):
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return np.ascontiguousarray(array).reshape(weight.torch_shape)


def from_torch(weight: Weight, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`; integers become floats, as all parameters are."""
    array = array.astype(np.float32) if array.dtype.kind in "iu" else array
    if weight.path.endswith(".kernel"):
        *window, inputs, outputs = weight.shape
        array = np.moveaxis(array.reshape(outputs, inputs, *window), (0, 1), (-1, -2))
    # Of a single number it makes a vector.
    return np.ascontiguousarray(array).reshape(weight.shape)


def model_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray], form: Format) -> Autoencoder:
    """The model that `config` describes, filled from PyTorch tensors, complete and of the right shapes."""
    params = {w.path: jnp.asarray(from_torch(w, tensors[w.name])) for w in weights(config, form)}
    return merge(structure(config)[0], params)


def dump_each(model: Autoencoder, form: Format) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of `model` as PyTorch tensors with their names, one at a time."""
    _, params = split(model)
    for weight in weights(model.config, form):
        yield weight.name, to_torch(weight, np.asarray(params[weight.path]))


def dump_tensors(model: Autoencoder, form: Format) -> dict[str, np.ndarray]:
    """All parameters of `model` as PyTorch tensors, by name."""
    return dict(dump_each(model, form))
