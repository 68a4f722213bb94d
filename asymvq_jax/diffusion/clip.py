"""CLIP's encoders: of texts, and of an example picture with Paint-by-Example's mapper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from asymvq_jax.diffusion.layers import ACTIVATIONS, FeedForward, LayerNorm, MultiHeadAttention, linear
from asymvq_jax.errors import CLIPError
from asymvq_jax.files.fields import COUNT, NUMBER, TEXT, without_nulls, wrong_fields
from asymvq_jax.models.blocks import Conv


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer of CLIP's."""

    channels: int
    inner: int
    layers: int
    heads: int
    activation: str
    epsilon: float


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text encoder; `length` tokens a text."""

    transformer: TransformerConfig
    vocabulary: int
    length: int
    # Channels of the whole text's features, of XL's second encoder; 0: none.
    projection: int = 0


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of an encoder of example pictures, `size` px square, whose features have `outputs` channels."""

    transformer: TransformerConfig
    size: int
    patch: int
    outputs: int

    @property
    def mapper_layers(self) -> int:
        """Of Paint-by-Example's mapper; its published rule."""
        return (self.transformer.layers + 1) // 5


@dataclass(frozen=True)
class ExampleConfig:
    """How a picture is prepared for CLIP: scaled to `size` px on the shorter side, cut to a square, normalised."""

    size: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


# What transformers' configuration classes have where a config.json says nothing: the sizes of CLIP ViT-B/32.
TEXT_DEFAULTS = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49408, "max_position_embeddings": 77,
    "projection_dim": 512,
}  # fmt: skip
IMAGE_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "projection_dim": 512,
}  # fmt: skip


# What the fields of both hold.
TYPES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), COUNT),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "image_size", "patch_size", "projection_dim"), COUNT),
    "hidden_act": TEXT,
    "layer_norm_eps": NUMBER,
}


def read_text_config(stored: Mapping[str, Any], name: str) -> TextConfig:
    """Translates the config.json of a transformers CLIPTextModel; `name` is its path, for messages.

    Raises:
        CLIPError: a model of another kind.
    """
    values = _check(stored, name, "clip_text_model", TEXT_DEFAULTS)
    projection = 0
    if "CLIPTextModelWithProjection" in (values.get("architectures") or ()):
        projection = values["projection_dim"]
        # The text's end is found as its greatest token, as transformers does for 2, which old files have.
        if (end := values.get("eos_token_id", 2)) not in (2, values["vocab_size"] - 1):
            raise CLIPError(f"{name}: eos_token_id={end} (expected 2, or the last of the vocabulary)")
    return TextConfig(_transformer(values), values["vocab_size"], values["max_position_embeddings"], projection)


def read_image_config(stored: Mapping[str, Any], name: str) -> ImageConfig:
    """Translates the config.json of Paint-by-Example's image encoder; `name` is its path, for messages.

    Raises:
        CLIPError: a model of another kind.
    """
    values = _check(stored, name, "clip_vision_model", IMAGE_DEFAULTS)
    if values.get("num_channels", 3) != 3:
        raise CLIPError(f"{name}: num_channels={values['num_channels']} (expected 3)")
    return ImageConfig(_transformer(values), values["image_size"], values["patch_size"], values["projection_dim"])


def read_example_config(stored: Mapping[str, Any], name: str) -> ExampleConfig:
    """Translates a preprocessor_config.json; what it does not say is as in CLIP.

    Raises:
        CLIPError: an unsupported preparation.
    """
    default = ExampleConfig()
    size, crop = stored.get("size", default.size), stored.get("crop_size", default.size)
    side = size.get("shortest_edge") if isinstance(size, Mapping) else size
    square = (crop.get("height"), crop.get("width")) if isinstance(crop, Mapping) else (crop, crop)
    off = [n for n in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if not stored.get(n, True)]
    if not isinstance(side, int) or off or square != (side, side) or stored.get("resample", 3) != 3:
        raise CLIPError(f"{name}: expected a bicubic resize and a square crop of one size, and normalisation")
    means = {n: tuple(stored.get(f"image_{n}", getattr(default, n))) for n in ("mean", "std")}
    return ExampleConfig(size=side, **means)


def prepare_example(image: np.ndarray, config: ExampleConfig) -> np.ndarray:
    """(h, w, 3) uint8 -> (size, size, 3) float32, as CLIP's own preparation: bicubic, the middle square, normalised."""
    height, width = image.shape[:2]
    sides = [config.size * side // min(height, width) for side in (width, height)]
    scaled = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BICUBIC))
    top, left = ((side - config.size) // 2 for side in scaled.shape[:2])
    square = scaled[top : top + config.size, left : left + config.size].astype(np.float32) / 255
    return (square - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)


def _check(stored: Mapping[str, Any], name: str, kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if stored.get("model_type") != kind:
        raise CLIPError(f"{name}: model_type is {stored.get('model_type')!r}; expected {kind!r}")
    values = {**defaults, **without_nulls(stored)}
    if wrong := wrong_fields(values, TYPES):
        raise CLIPError(f"{name}: {', '.join(wrong)}")
    if values["hidden_act"] not in ACTIVATIONS:
        raise CLIPError(f"{name}: hidden_act={values['hidden_act']!r} (expected {' or '.join(ACTIVATIONS)})")
    return values


def _transformer(values: Mapping[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        channels=values["hidden_size"],
        inner=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        activation=values["hidden_act"],
        epsilon=values["layer_norm_eps"],
    )


class Block(nnx.Module):
    """Self-attention and feed-forward, each after a normalisation and with a residual."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.channels
        self.norm1 = LayerNorm(channels, epsilon=config.epsilon, dtype=dtype)
        self.attention = MultiHeadAttention(channels, channels, config.heads, bias=True, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(channels, epsilon=config.epsilon, dtype=dtype)
        self.feed_forward = FeedForward(channels, config.inner, activation=config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, causal: bool = False) -> jax.Array:
        """(b, n, channels) -> (b, n, channels)."""
        x = x + self.attention(self.norm1(x), causal=causal)
        return x + self.feed_forward(self.norm2(x))


class TextEncoder(nnx.Module):
    """Texts as tokens to the features that the UNet attends to."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        inner = config.transformer
        self.config = config
        self.dtype = dtype
        self.tokens = nnx.Embed(config.vocabulary, inner.channels, param_dtype=jnp.float32, rngs=rngs)
        self.positions = nnx.Embed(config.length, inner.channels, param_dtype=jnp.float32, rngs=rngs)
        self.blocks = nnx.List([Block(inner, dtype=dtype, rngs=rngs) for _ in range(inner.layers)])
        self.norm_out = LayerNorm(inner.channels, epsilon=inner.epsilon, dtype=dtype)
        self.projection = (
            linear(inner.channels, config.projection, bias=False, dtype=dtype, rngs=rngs) if config.projection else None
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(b, n) int32, n at most `config.length` -> (b, n, channels)."""
        return self.norm_out(self._hidden(tokens)[1])

    def both(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """As XL takes them: (b, n) -> the last block's input, (b, n, channels), and the text's, (b, projection)."""
        before, last = self._hidden(tokens)
        if self.projection is None:
            return before, None
        end = self.norm_out(last)[jnp.arange(len(tokens)), jnp.argmax(tokens, -1)]
        return before, self.projection(end)

    def _hidden(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the last block takes and gives."""
        x = self.tokens.embedding[...][tokens] + self.positions.embedding[...][None, : tokens.shape[1]]
        x = before = x.astype(self.dtype)
        for block in self.blocks:
            before, x = x, block(x, causal=True)
        return before, x


class ImageEncoder(nnx.Module):
    """Paint-by-Example's features of a picture: CLIP's class token, through a mapper and a projection."""

    def __init__(self, config: ImageConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        inner, side = config.transformer, config.size // config.patch
        channels = inner.channels
        self.config = config
        self.dtype = dtype
        self.patches = Conv(
            3, channels, config.patch, stride=config.patch, padding=(0, 0), bias=False, dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.positions = nnx.Embed(side**2 + 1, channels, param_dtype=jnp.float32, rngs=rngs)
        self.norm_in = LayerNorm(channels, epsilon=inner.epsilon, dtype=dtype)
        self.blocks = nnx.List([Block(inner, dtype=dtype, rngs=rngs) for _ in range(inner.layers)])
        self.norm_pooled = LayerNorm(channels, epsilon=inner.epsilon, dtype=dtype)
        mapper = TransformerConfig(channels, 4 * channels, config.mapper_layers, 1, "gelu", 1e-5)
        self.mapper = nnx.List([Block(mapper, dtype=dtype, rngs=rngs) for _ in range(mapper.layers)])
        self.norm_out = LayerNorm(channels, dtype=dtype)
        self.proj_out = linear(channels, config.outputs, dtype=dtype, rngs=rngs)
        # In place of an example's features where there is no example: for guidance.
        self.unconditional = nnx.Param(jnp.zeros((1, 1, config.outputs), jnp.float32))

    def __call__(self, image: jax.Array) -> jax.Array:
        """(b, size, size, 3), normalised as CLIP wants it (`prepare_example`) -> (b, 1, outputs)."""
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1) + self.positions.embedding[...].astype(self.dtype)[None]
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm_pooled(x[:, :1])
        for block in self.mapper:
            x = block(x)
        return self.proj_out(self.norm_out(x))
