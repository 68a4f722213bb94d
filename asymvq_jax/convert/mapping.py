"""The one table of weight names, read in both directions: ours, diffusers', and the original checkpoints' (LDM)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import merge, split

Format = Literal["diffusers", "ldm"]


class Row(NamedTuple):
    """One kind of module under its three names; {i} is the level, {u} the level counted from the other end."""

    ours: str
    diffusers: str
    ldm: str


def _block(ours: str, diffusers: str, ldm: str) -> list[Row]:
    same = [Row(f"{ours}.{n}", f"{diffusers}.{n}", f"{ldm}.{n}") for n in ("norm1", "conv1", "norm2", "conv2")]
    return [*same, Row(f"{ours}.shortcut", f"{diffusers}.conv_shortcut", f"{ldm}.nin_shortcut")]


def _attention(*prefixes: str) -> list[Row]:
    inside = [
        ("norm", "group_norm", "norm"),
        ("query", "to_q", "q"),
        ("key", "to_k", "k"),
        ("value", "to_v", "v"),
        ("out", "to_out.0", "proj_out"),
    ]
    return [Row(*(f"{prefix}.{name}" for prefix, name in zip(prefixes, names, strict=True))) for names in inside]


def _half(half: str) -> list[Row]:
    return [
        Row(f"{half}.conv_in", f"{half}.conv_in", f"{half}.conv_in"),
        *_block(f"{half}.mid.block1", f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"),
        *_attention(f"{half}.mid.attention", f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"),
        *_block(f"{half}.mid.block2", f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"),
        Row(f"{half}.norm_out", f"{half}.conv_norm_out", f"{half}.norm_out"),
        Row(f"{half}.conv_out", f"{half}.conv_out", f"{half}.conv_out"),
    ]


TABLE: list[Row] = [
    *_half("encoder"),
    *_block("encoder.levels.{i}.blocks.{j}", "encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}"),
    *_attention(
        "encoder.levels.{i}.attentions.{j}", "encoder.down_blocks.{i}.attentions.{j}", "encoder.down.{i}.attn.{j}"
    ),
    Row(
        "encoder.levels.{i}.downsample",
        "encoder.down_blocks.{i}.downsamplers.0.conv",
        "encoder.down.{i}.downsample.conv",
    ),
    Row("quant_conv", "quant_conv", "quant_conv"),
    Row("codebook", "quantize.embedding", "quantize.embedding"),
    Row("post_quant_conv", "post_quant_conv", "post_quant_conv"),
    *_half("decoder"),
    *_block("decoder.levels.{i}.blocks.{j}", "decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{u}.block.{j}"),
    *_attention("decoder.levels.{i}.attentions.{j}", "decoder.up_blocks.{i}.attentions.{j}", "decoder.up.{u}.attn.{j}"),
    Row("decoder.levels.{i}.upsample", "decoder.up_blocks.{i}.upsamplers.0.conv", "decoder.up.{u}.upsample.conv"),
    Row("decoder.condition.layers.{i}", "decoder.condition_encoder.layers.{i}", "decoder.encoder.layers.{i}"),
]

# Names that diffusers wrote before 0.18 (Stable Diffusion's published VAE folders have them), read only.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_PATTERNS = [
    (re.compile(re.escape(row.ours).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")), row)
    for row in TABLE
]


class Weight(NamedTuple):
    """One parameter: its name in our model, its shape there, and its name and shape in a PyTorch file."""

    path: str
    shape: tuple[int, ...]
    name: str
    torch_shape: tuple[int, ...]


def weights(config: ModelConfig, form: Format) -> list[Weight]:
    """All parameters of the model that `config` describes, with their names in `form`."""
    _, shapes = structure(config)
    levels = len(config.encoder_channels)
    result = []
    for ours, leaf in shapes.items():
        joined, _, kind = ours.rpartition(".")
        match, row = next((m, row) for pattern, row in _PATTERNS if (m := pattern.fullmatch(joined)))
        indices = {k: int(v) for k, v in match.groupdict().items()}
        name = getattr(row, form).format(**indices, u=levels - 1 - indices.get("i", 0))
        shape = tuple(leaf.shape)
        full_name = f"{name}.{'bias' if kind == 'bias' else 'weight'}"
        result.append(Weight(ours, shape, full_name, _torch_shape(shape, linear=_is_linear(row, form))))
    return result


def to_torch(weight: Weight, array: np.ndarray) -> np.ndarray:
    """A parameter in PyTorch's layout: (h, w, in, out) becomes (out, in, h, w), or (out, in) for a linear layer."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(array.reshape(weight.torch_shape))


def from_torch(weight: Weight, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if len(weight.shape) == 4:
        h, w, i, o = weight.shape
        array = array.reshape(o, i, h, w).transpose(2, 3, 1, 0)
    return np.ascontiguousarray(array)


def _is_linear(row: Row, form: Format) -> bool:
    return form == "diffusers" and ".attentions." in row.diffusers


def _torch_shape(shape: tuple[int, ...], *, linear: bool) -> tuple[int, ...]:
    if len(shape) != 4:
        return shape
    h, w, i, o = shape
    return (o, i) if linear else (o, i, h, w)


def model_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray], form: Format) -> Autoencoder:
    """The model that `config` describes, filled from PyTorch tensors, complete and of the right shapes."""
    params = {w.path: jnp.asarray(from_torch(w, tensors[w.name])) for w in weights(config, form)}
    return merge(structure(config)[0], params)


def dump_tensors(model: Autoencoder, form: Format) -> dict[str, np.ndarray]:
    """All parameters of `model` as PyTorch tensors, by name."""
    _, params = split(model)
    return {w.name: to_torch(w, np.asarray(params[w.path])) for w in weights(model.config, form)}
