"""The asymmetric decoder: wider and deeper than the encoder, with a branch that hands it the unmasked pixels."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.blocks import Conv, Layers, Level, MidBlock, UpsampleConv, run_block
from asymvq_jax.models.causal import layers_of
from asymvq_jax.models.tone import ToneField

# On the device, or on the host, where pictures are decoded in strips.
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


class ConditionBranch(nnx.Module):
    """A light convolutional encoder of the masked picture (paper, section 3.2).

    Two 3x3 convolutions at full resolution, then one 4x4 stride-2 convolution per level; ReLU between them.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        channels, dtype = config.decoder_channels, jnp.dtype(config.dtype)
        widths = (config.image_channels + config.condition_mask, *channels, channels[-1])
        self.layers = nnx.List(
            [
                Conv(widths[i], widths[i + 1], 3, dtype=dtype, rngs=rngs)
                if i < 2
                else Conv(widths[i], widths[i + 1], 4, stride=2, padding=(1, 1), dtype=dtype, rngs=rngs)
                for i in range(len(widths) - 1)
            ]
        )

    def __call__(self, masked_image: Float[Array, "b h w c"]) -> list[Float[Array, "b _ _ _"]]:
        """Features before each ReLU, outermost first: (h, w), (h, w), (h/2, w/2), ... the latent's resolution."""
        features = []
        x = masked_image
        for layer in self.layers:
            x = layer(x)
            features.append(x)
            x = jax.nn.relu(x)
        return features


class UpLevel(Level):
    """A level of the decoder and, but for the outermost one, nearest upsampling and a convolution."""

    def __init__(self, inputs: int, index: int, config: ModelConfig, layers: Layers, *, rngs: nnx.Rngs) -> None:
        outputs = config.decoder_channels[index]
        super().__init__(
            inputs,
            outputs,
            layers,
            blocks=config.decoder_blocks + 1,
            attention=index in config.attention_levels,
            remat=config.remat,
            rngs=rngs,
        )
        upsampled = layers.upsampled(outputs)
        self.upsample = UpsampleConv(outputs, upsampled, dtype=layers.dtype, rngs=rngs) if index else None
        self.over_time = layers.over_time(index - 1, outputs, 2 * outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w inputs"]) -> Float[Array, "b _ _ outputs"]:
        """(b, h, w, inputs) -> (b, 2h, 2w, what follows upsampling), or (b, h, w, outputs) at the outermost level."""
        x = super().__call__(x)
        return x if self.upsample is None else self.upsample(x)


class Decoder(nnx.Module):
    """Latent to image, blended at every resolution with the condition branch's features by the mask."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        channels, layers = config.decoder_channels, layers_of(config.decoder_layers, config)
        inputs = [*(layers.upsampled(c) for c in channels[1:]), channels[-1]]
        self.conv_in = layers.conv(config.latent_channels, channels[-1], 3, rngs=rngs)
        self.mid = MidBlock(channels[-1], layers, attention=config.mid_attention, remat=config.remat, rngs=rngs)
        self.levels = nnx.List(
            [UpLevel(inputs[i], i, config, layers, rngs=rngs) for i in reversed(range(len(channels)))]
        )
        self.norm_out = layers.norm(channels[0])
        self.conv_out = layers.conv(channels[0], config.image_channels, 3, rngs=rngs)
        self.condition = ConditionBranch(config, rngs=rngs) if config.condition else None
        self.tone = ToneField(config.image_channels, rngs=rngs) if config.tone_field else None
        self.remat = config.remat
        self.condition_mask, self.mask_reduction = config.condition_mask, config.mask_reduction

    def __call__(
        self,
        z: Float[Array, "b y x z"],
        image: Float[Array, "#b h w c"] | None = None,
        mask: Float[Array, "#b h w 1"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """(b, h, w, latent_channels) -> (b, 8h, 8w, 3) float32; see `features` for the condition."""
        return self.toned(self.to_image(self.features(z, image, mask)), image, mask)

    def toned(self, picture: jax.Array, image: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """The decoded picture with its tone set right under the mask, where the decoder has a field of tone."""
        if self.tone is None or image is None or mask is None:
            return picture
        image, mask = (jnp.broadcast_to(x, (len(picture), *x.shape[1:])) for x in (image, mask))
        return self.tone(picture, image, mask)

    def to_image(
        self, features: Float[Array, "b h w features"], kernel: Float[Array, "... features c"] | None = None
    ) -> Float[Array, "b h w c"]:
        """The last convolution, in float32 at its output; `kernel` stands in for its own where given."""
        return self.conv_out.apply(features, kernel=kernel).astype(jnp.float32)

    def unconditioned(self, z: Float[Array, "b y x z"]) -> list[Array]:
        """What `features` would have blended with the condition branch's features, in their order, had it no mask."""
        h = self.mid(self.conv_in(z))
        features = [h]
        for level in self.levels:
            h = level(h)
            features.append(h)
        return features[::-1]

    def features(
        self,
        z: Float[Array, "b y x z"],
        image: Float[Array, "#b h w c"] | None = None,
        mask: Float[Array, "#b h w 1"] | None = None,
    ) -> Float[Array, "b h w features"]:
        """All but the last convolution.

        Args:
            z: (b, h, w, latent_channels).
            image: (b, 8h, 8w, 3) in [-1, 1], the picture whose unmasked pixels condition the decoder; or (1, ...).
            mask: (b, 8h, 8w, 1), 1 = generate, 0 = preserve; values between blend; or (1, ...) with such an image.

        Returns:
            (b, 8h, 8w, decoder_channels[0]), which `to_image` turns into the picture.
        """
        if image is None or mask is None:
            return self.features_with(z, [], None)
        return self.features_with(z, self.condition_features(image, mask), mask)

    def condition_features(
        self, image: Float[Array, "b h w c"], mask: Float[Array, "b h w 1"]
    ) -> list[Float[Array, "b _ _ _"]]:
        """What the condition branch makes of a picture's unmasked pixels, outermost first; see `features`."""
        if self.condition is None:
            raise ValueError("this decoder has no condition branch (model.condition=False); decode without a mask")
        dtype = self.conv_in.dtype
        with jax.named_scope("condition"):
            seen = self.condition_input(image.astype(dtype), mask.astype(dtype))
            features: list[Array] = run_block(self.condition, seen, remat=self.remat)
        return features

    def features_with(
        self, z: Float[Array, "b y x z"], features: list[Float[Array, "_ _ _ _"]], mask: Float[Array, "#b h w 1"] | None
    ) -> Float[Array, "b h w features"]:
        """As `features`, with the condition's features already made; none, and no mask, without a condition."""
        h = self.mid(self.conv_in(z))
        masks = [] if mask is None else level_masks(mask.astype(h.dtype), len(features), self.mask_reduction)
        for i, level in enumerate(self.levels):
            if features:
                h = blend(h, features[-1 - i], masks[-1 - i])
            h = level(h)
        if features:
            h = blend(h, features[0], masks[0])
        return self.norm_out(h)

    def condition_input(self, image: AnyArray, mask: AnyArray) -> AnyArray:
        """What the condition branch sees: (b, h, w, 3) without what the mask covers, and the mask where it takes it."""
        kept: AnyArray = (1 - mask) * image
        if not self.condition_mask:
            return kept
        if isinstance(kept, np.ndarray):
            return np.concatenate([kept, mask], -1)
        return jnp.concatenate([kept, mask], -1)


def grow(mask: Float[Array, "b h w 1"], margin: int) -> Float[Array, "b h w 1"]:
    """The greatest value within `margin` px, across and down."""
    for window in ((1, 2 * margin + 1, 1, 1), (1, 1, 2 * margin + 1, 1)):
        mask = jax.lax.reduce_window(mask, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "SAME")
    return mask


def level_masks(mask: AnyArray, count: int, reduction: str) -> list[AnyArray]:
    """The masks to blend with, one for each feature of the condition branch.

    Args:
        mask: (b, h, w, 1), 1 = generate.
        count: of the features; the first two have the mask's resolution, each other one half of the one before.
        reduction: see `ModelConfig.mask_reduction`.

    Returns:
        Outermost first. The first is the mask itself, with which the decoder ends.
    """
    masks = [mask]
    for stride in (2**level for level in range(count - 1)):
        if reduction == "nearest":
            masks.append(mask[:, ::stride, ::stride])
        else:
            batch, height, width, _ = mask.shape
            cells = mask.reshape(batch, height // stride, stride, width // stride, stride, 1)
            masks.append((cells.max((2, 4)) > 0).astype(mask.dtype))
    return masks


def blend(
    h: Float[Array, "b y x features"], feature: Float[Array, "#b y x features"], mask: Float[Array, "#b y x 1"]
) -> Float[Array, "b y x features"]:
    """h where the mask, of the same resolution, is 1; the condition's feature where it is 0."""
    return h * mask + feature * (1 - mask)
