"""The denoising UNet of Stable Diffusion 1, 2 and XL: 4 channels in, or 9 for inpainting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from asymvq_jax.diffusion.layers import FeedForward, LayerNorm, MultiHeadAttention, linear
from asymvq_jax.errors import UNetError
from asymvq_jax.models.blocks import Conv, GroupNorm, UpsampleConv


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; level 0 is the outermost."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    # Residual blocks a level on the way down; on the way up there is one more.
    blocks: int = 2
    # Which levels attend, and the heads of each level's attention.
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    # Blocks of each level's transformers; empty: one.
    depths: tuple[int, ...] = ()
    # Channels of the text's (or example's) features.
    context: int = 768
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    # Height and width of the latents that it was trained on.
    sample_size: int = 64
    # XL's: channels of the pooled text and the sizes' features together, and of one number's; 0: none.
    added: int = 0
    added_time: int = 256

    @property
    def downsampling(self) -> int:
        """By how much the innermost level is smaller than the latent."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def pooled(self) -> int:
        """Channels of XL's pooled text."""
        return self.added - SIZES * self.added_time

    def depth(self, level: int) -> int:
        """Blocks of a transformer of that level."""
        return self.depths[level] if self.depths else 1


# Numbers that XL's UNet takes for each picture: height and width of the original, top and left of the crop, height and
# width of the target.
SIZES = 6


class Added(NamedTuple):
    """What XL's UNet takes beside the time."""

    # (b, config.pooled).
    pooled: jax.Array
    # (b, 6), px.
    sizes: jax.Array


# Of diffusers' options, those that change what is computed, with the values that Stable Diffusion has.
EXPECTED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def read_config(stored: Mapping[str, Any], name: str) -> UNetConfig:
    """Translates the config.json of a diffusers UNet2DConditionModel.

    Args:
        stored: its content.
        name: its path, for messages.

    Raises:
        UNetError: another class, or a field with a value that our UNet does not have.
    """
    if stored.get("_class_name") != "UNet2DConditionModel":
        raise UNetError(f"{name}: _class_name is {stored.get('_class_name')!r}; expected 'UNet2DConditionModel'")
    needed = ("block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types")
    if missing := [field for field in needed if field not in stored]:
        raise UNetError(f"{name}: missing {', '.join(missing)}")
    channels, levels = tuple(stored["block_out_channels"]), len(stored["block_out_channels"])
    attention = tuple(block == "CrossAttnDownBlock2D" for block in stored["down_block_types"])
    expected = EXPECTED | {
        "down_block_types": [("CrossAttn" if a else "") + "DownBlock2D" for a in attention],
        "up_block_types": [("CrossAttn" if a else "") + "UpBlock2D" for a in reversed(attention)],
    }
    # Nothing and no are one, as in diffusers.
    wrong = [
        f"{n}={stored[n]!r} (expected {v!r})" for n, v in expected.items() if (stored.get(n, v) or None) != (v or None)
    ]
    wrong += [
        f"{n}={stored[n]!r} (expected a number)"
        for n in ("layers_per_block", "cross_attention_dim", "sample_size")
        if not isinstance(stored.get(n) or 2, int)
    ]
    depths, added = stored.get("transformer_layers_per_block", 1), stored.get("addition_embed_type")
    depths = (depths,) * levels if isinstance(depths, int) else depths
    if not isinstance(depths, list | tuple) or len(depths) != levels or not all(isinstance(n, int) for n in depths):
        wrong.append(f"transformer_layers_per_block={depths!r} (expected a number, or one for each level)")
    if added not in (None, "text_time"):
        wrong.append(f"addition_embed_type={added!r} (expected None or 'text_time')")
    if wrong:
        raise UNetError(f"{name}: this kind of UNet is not supported: {', '.join(wrong)}")
    # diffusers' name is wrong, as its source says: it is the number of heads.
    heads = stored.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=stored.get("in_channels", 4),
        out_channels=stored.get("out_channels", 4),
        channels=channels,
        blocks=stored.get("layers_per_block", 2),
        attention=attention,
        heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * levels,
        context=stored["cross_attention_dim"],
        norm_groups=stored.get("norm_num_groups", 32),
        norm_epsilon=stored.get("norm_eps", 1e-5),
        sample_size=stored.get("sample_size") or 64,
        depths=() if set(depths) == {1} else tuple(depths),
        added=stored.get("projection_class_embeddings_input_dim", 0) if added else 0,
        added_time=stored.get("addition_time_embed_dim", 256) if added else 256,
    )


class TimedBlock(nnx.Module):
    """Residual block to whose middle the time's features are added."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = GroupNorm(inputs, config.norm_groups, epsilon=config.norm_epsilon, dtype=dtype)
        self.conv1 = Conv(inputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.time = linear(4 * config.channels[0], outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs, config.norm_groups, epsilon=config.norm_epsilon, dtype=dtype)
        self.conv2 = Conv(outputs, outputs, 3, dtype=dtype, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, 1, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """(b, h, w, inputs), (b, 4 * channels[0]) after its SiLU -> (b, h, w, outputs)."""
        h = self.conv1(self.norm1(x)) + self.time(time)[:, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.shortcut is None else self.shortcut(x))


class TransformerBlock(nnx.Module):
    """Attention of all pixels to each other, to the context, and a gated feed-forward; each with a residual."""

    def __init__(self, channels: int, heads: int, context: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(channels, dtype=dtype)
        self.self_attention = MultiHeadAttention(channels, channels, heads, bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(channels, dtype=dtype)
        self.cross_attention = MultiHeadAttention(channels, context, heads, bias=False, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(channels, dtype=dtype)
        self.feed_forward = FeedForward(channels, 4 * channels, gated=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """(b, n, channels), (b, m, context) -> (b, n, channels)."""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class Transformer(nnx.Module):
    """Blocks over all pixels of a level, between two linear layers; with a residual."""

    def __init__(self, level: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels, heads = config.channels[level], config.heads[level]
        self.norm = GroupNorm(channels, config.norm_groups, silu=False, dtype=dtype)
        self.proj_in = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                TransformerBlock(channels, heads, config.context, dtype=dtype, rngs=rngs)
                for _ in range(config.depth(level))
            ]
        )
        self.proj_out = linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """(b, h, w, channels), (b, m, config.context) -> (b, h, w, channels)."""
        b, height, width, c = x.shape
        h = self.proj_in(self.norm(x).reshape(b, height * width, c))
        for block in self.blocks:
            h = block(h, context)
        return x + self.proj_out(h).reshape(x.shape)


class UNetLevel(nnx.Module):
    """What one resolution has on the way down or up: residual blocks, each with a transformer where it attends."""

    def __init__(self, inputs: list[int], level: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """`inputs` are the channels that each of the blocks takes."""
        channels = config.channels[level]
        self.blocks = nnx.List([TimedBlock(n, channels, config, dtype=dtype, rngs=rngs) for n in inputs])
        attentions = len(inputs) if config.attention[level] else 0
        self.attentions = nnx.List([Transformer(level, config, dtype=dtype, rngs=rngs) for _ in range(attentions)])

    def run(self, i: int, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        """The i-th block and its transformer."""
        x = self.blocks[i](x, time)
        return self.attentions[i](x, context) if self.attentions else x


class DownLevel(UNetLevel):
    """A level on the way down, which all but the innermost end by halving the resolution."""

    def __init__(self, level: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.channels[level]
        first = config.channels[max(level - 1, 0)]
        super().__init__([first] + [channels] * (config.blocks - 1), level, config, dtype=dtype, rngs=rngs)
        last = level == len(config.channels) - 1
        self.downsample = (
            None if last else Conv(channels, channels, 3, stride=2, padding=(1, 1), dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> list[jax.Array]:
        """(b, h, w, c) -> the results of all its layers, for the way up; the last goes on down."""
        results = []
        for i in range(len(self.blocks)):
            x = self.run(i, x, time, context)
            results.append(x)
        return results if self.downsample is None else [*results, self.downsample(x)]


class UpLevel(UNetLevel):
    """A level on the way up, whose blocks take the way down's results, and which all but the outermost end by doubling
    the resolution."""

    def __init__(self, level: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        skips = [channels] * config.blocks + [config.channels[max(level - 1, 0)]]
        inputs = [x + skip for x, skip in zip([below] + [channels] * config.blocks, skips, strict=True)]
        super().__init__(inputs, level, config, dtype=dtype, rngs=rngs)
        self.upsample = None if level == 0 else UpsampleConv(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, skips: list[jax.Array], time: jax.Array, context: jax.Array) -> jax.Array:
        """(b, h, w, c), the way down's results in the order of their making, of which it takes the last."""
        for i in range(len(self.blocks)):
            x = self.run(i, jnp.concatenate([x, skips.pop()], -1), time, context)
        return x if self.upsample is None else self.upsample(x)


class UNet(nnx.Module):
    """Predicts the noise of a latent (or v), given the time and the features of a text or an example."""

    def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dtype
        first, last = config.channels[0], config.channels[-1]
        self.time1 = linear(first, 4 * first, dtype=dtype, rngs=rngs)
        self.time2 = linear(4 * first, 4 * first, dtype=dtype, rngs=rngs)
        self.added1 = linear(config.added, 4 * first, dtype=dtype, rngs=rngs) if config.added else None
        self.added2 = linear(4 * first, 4 * first, dtype=dtype, rngs=rngs) if config.added else None
        self.conv_in = Conv(config.in_channels, first, 3, dtype=dtype, rngs=rngs)
        levels = range(len(config.channels))
        self.down = nnx.List([DownLevel(i, config, dtype=dtype, rngs=rngs) for i in levels])
        self.mid_block1 = TimedBlock(last, last, config, dtype=dtype, rngs=rngs)
        self.mid_attention = Transformer(len(config.channels) - 1, config, dtype=dtype, rngs=rngs)
        self.mid_block2 = TimedBlock(last, last, config, dtype=dtype, rngs=rngs)
        # From the innermost on.
        self.up = nnx.List([UpLevel(i, config, dtype=dtype, rngs=rngs) for i in reversed(levels)])
        self.norm_out = GroupNorm(first, config.norm_groups, epsilon=config.norm_epsilon, dtype=dtype)
        self.conv_out = Conv(first, config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array, added: Added | None = None) -> jax.Array:
        """The prediction, float32.

        Args:
            x: (b, h, w, in_channels), noisy latents; for inpainting followed by the mask and the masked picture's
                latent. Height and width are multiples of `config.downsampling`.
            time: (b,) timesteps of training.
            context: (b, m, config.context).
            added: XL's pooled text and sizes.

        Returns:
            (b, h, w, out_channels).

        Raises:
            ValueError: `x` has a wrong shape, or `added` is missing.
        """
        multiple, channels = self.config.downsampling, self.config.in_channels
        if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % multiple or x.shape[2] % multiple:
            raise ValueError(f"x has shape {x.shape}: expected (b, h, w, {channels}), h and w multiples of {multiple}")
        time = self.time2(jax.nn.silu(self.time1(embed_time(time, self.config.channels[0]).astype(self.dtype))))
        if self.added1 is not None and self.added2 is not None:
            if added is None:
                raise ValueError("this UNet needs the pooled text and the sizes")
            sizes = embed_time(added.sizes.reshape(-1), self.config.added_time).reshape(len(x), -1)
            features = jnp.concatenate([added.pooled.astype(jnp.float32), sizes], -1).astype(self.dtype)
            time = time + self.added2(jax.nn.silu(self.added1(features)))
        time, context = jax.nn.silu(time), context.astype(self.dtype)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], time, context)
        x = self.mid_block1(skips[-1], time)
        x = self.mid_block2(self.mid_attention(x, context), time)
        for above in self.up:
            x = above(x, skips, time, context)
        return self.conv_out(self.norm_out(x)).astype(jnp.float32)


def embed_time(time: jax.Array, channels: int) -> jax.Array:
    """Cosines and sines of the times at geometric frequencies from 1 to 1 / 10000: (b,) -> (b, channels) float32."""
    half = channels // 2
    frequency = jnp.exp(-jnp.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angle = time.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
