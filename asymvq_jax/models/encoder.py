"""The encoder: image to the moments of the latent's posterior, or with a codebook to the latent."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.blocks import Conv, Layers, Level, MidBlock
from asymvq_jax.models.causal import layers_of


class DownLevel(Level):
    """A level of the encoder and, but for the last one, a stride-2 convolution."""

    def __init__(self, inputs: int, index: int, config: ModelConfig, layers: Layers, *, rngs: nnx.Rngs) -> None:
        outputs = config.encoder_channels[index]
        super().__init__(
            inputs,
            outputs,
            layers,
            blocks=config.encoder_blocks,
            attention=index in config.attention_levels,
            remat=config.remat,
            rngs=rngs,
        )
        last = index == len(config.encoder_channels) - 1
        # One row and column of zeros at the bottom and the right only.
        self.downsample = (
            None if last else Conv(outputs, outputs, 3, stride=2, padding=(0, 1), dtype=layers.dtype, rngs=rngs)
        )
        self.over_time = layers.over_time(index, outputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w inputs"]) -> Float[Array, "b _ _ outputs"]:
        """(b, h, w, inputs) -> (b, h/2, w/2, outputs), or (b, h, w, outputs) at the last level."""
        x = super().__call__(x)
        return x if self.downsample is None else self.downsample(x)


class Encoder(nnx.Module):
    """(b, h, w, 3) in [-1, 1] -> (b, h/8, w/8, encoder_outputs) for four levels."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        channels, layers = config.encoder_channels, layers_of(config.encoder_layers, config)
        self.conv_in = layers.conv(config.image_channels, channels[0], 3, rngs=rngs)
        self.levels = nnx.List(
            [DownLevel(channels[max(i - 1, 0)], i, config, layers, rngs=rngs) for i in range(len(channels))]
        )
        self.mid = MidBlock(channels[-1], layers, attention=config.mid_attention, remat=config.remat, rngs=rngs)
        self.norm_out = layers.norm(channels[-1])
        self.conv_out = layers.conv(channels[-1], config.encoder_outputs, 3, rngs=rngs)

    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b y x outputs"]:
        x = self.conv_in(image)
        for level in self.levels:
            x = level(x)
        return self.head(x)

    def head(self, x: Float[Array, "b y x channels"]) -> Float[Array, "b y x outputs"]:
        """What follows the levels: (b, h/8, w/8, channels) -> (b, h/8, w/8, encoder_outputs)."""
        return self.conv_out(self.norm_out(self.mid(x)))
