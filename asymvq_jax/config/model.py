"""The sizes of an autoencoder, as a frozen, documented, validated dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from asymvq_jax.config.forms import one_of, require, settle

Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)
LAYERS = ("sd", "wan", "qwen-image")


MASK_REDUCTIONS = ("nearest", "area-any")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one autoencoder. The defaults are Stable Diffusion 1.x's encoder with the paper's base decoder."""

    # Channels of the pictures.
    image_channels: int = 3
    # Channels of the latent.
    latent_channels: int = 4
    # A diffusion model sees (latent - shift_factor) * scaling_factor, or with a mean and a deviation for each channel
    # (latent - latent_mean) / latent_std * scaling_factor; empty: none.
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    # It sees squares of so many of the latent's pixels, along each side, as channels of one pixel (FLUX.2: 2).
    latent_patch: int = 1
    # Above 0, patches are normalised by batch statistics that are among the weights, with this epsilon (FLUX.2: 1e-4),
    # instead of the above.
    batch_norm_epsilon: float = 0.0
    # Channels of each resolution, outermost (full resolution) first; both halves need the same number of levels.
    encoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    # What each half is built of. sd: group norms and 2-D convolutions; wan and qwen-image, which are alike: RMS norms
    # and convolutions that are causal over time, of which a picture meets the last slice.
    encoder_layers: Annotated[str, one_of(LAYERS)] = "sd"
    decoder_layers: Annotated[str, one_of(LAYERS)] = "sd"
    # wan and qwen-image only: the levels at whose end there is a convolution over time, which a picture never meets; it
    # is kept for converting back.
    temporal_levels: tuple[int, ...] = ()
    # Residual blocks a level. The decoder builds one more than this, as in the reference.
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    # Levels whose residual blocks are each followed by attention, in both halves; 0 is the full resolution.
    attention_levels: tuple[int, ...] = ()
    # Whether there is attention between the two blocks at the latent's resolution.
    mid_attention: bool = True
    # 1x1 convolutions on both sides of the latent (Stable Diffusion 1, 2 and XL and VQ models have them).
    quant_conv: bool = True
    # Codes of the codebook of a VQ-regularised latent; 0: the latent is KL-regularised.
    codebook_size: int = 0
    # The branch that hands the decoder the unmasked pixels (paper, section 3.2).
    condition: bool = True
    # Whether that branch sees the mask as one more channel of the picture, as ASUKA's decoder does.
    condition_mask: bool = False
    # How the mask is reduced to each resolution. nearest: one pixel of each cell, as in the paper's code; area-any: a
    # cell that holds anything of the mask is masked, as in ASUKA's, so that no thin line is lost.
    mask_reduction: Annotated[str, one_of(MASK_REDUCTIONS)] = "nearest"
    # A network beside the decoder that sets the fill's tone right by a smooth field (asymvq_jax/models/tone.py).
    tone_field: bool = False
    # Groups of every group normalisation; must divide every channel count of a half that has some.
    norm_groups: int = 32
    # Compute type: float32 or bfloat16. Parameters, norms and softmax are always float32.
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    # Recompute residual blocks and the condition branch in the backward pass instead of keeping their activations.
    remat: bool = False

    def __post_init__(self) -> None:
        settle(self, "model")
        for name in ("image_channels", "latent_channels", "encoder_blocks", "decoder_blocks", "norm_groups"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        require(self.scaling_factor > 0, "model.scaling_factor", self.scaling_factor, "a positive number")
        self._check_latent()
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for half in ("encoder", "decoder"):
            channels, layers = getattr(self, f"{half}_channels"), getattr(self, f"{half}_layers")
            require(layers in LAYERS, f"model.{half}_layers", layers, f"one of {', '.join(LAYERS)}")
            multiple, what = (self.norm_groups, f"model.norm_groups={self.norm_groups}") if layers == "sd" else (2, "2")
            require(
                len(channels) >= 2 and all(c > 0 and c % multiple == 0 for c in channels),
                f"model.{half}_channels",
                channels,
                f"two or more levels, each a multiple of {what}",
            )
        require(
            len(self.encoder_channels) == len(self.decoder_channels),
            "model.decoder_channels",
            self.decoder_channels,
            f"as many levels as model.encoder_channels={self.encoder_channels}",
        )
        levels = range(len(self.encoder_channels))
        require(
            set(self.attention_levels) <= set(levels),
            "model.attention_levels",
            self.attention_levels,
            f"some of {', '.join(map(str, levels))}, or none",
        )
        require(self.condition or not self.tone_field, "model.tone_field", self.tone_field, "model.condition as well")
        require(self.codebook_size >= 0, "model.codebook_size", self.codebook_size, "zero or more")
        require(
            self.mask_reduction in MASK_REDUCTIONS,
            "model.mask_reduction",
            self.mask_reduction,
            f"one of {', '.join(MASK_REDUCTIONS)}",
        )
        require(
            self.condition or not self.condition_mask,
            "model.condition_mask",
            self.condition_mask,
            "false without a condition branch (model.condition=False)",
        )
        require(
            self.decoder_layers == "sd" or (self.decoder_layers == self.encoder_layers and not self.condition),
            "model.decoder_layers",
            self.decoder_layers,
            "'sd', or without a condition branch the encoder's",
        )
        require(
            set(self.temporal_levels) <= (set(levels[:-1]) if self.encoder_layers != "sd" else set()),
            "model.temporal_levels",
            self.temporal_levels,
            "none, or with model.encoder_layers='wan' or 'qwen-image' some levels but the last",
        )
        require(
            self.encoder_layers == "sd" or not (self.attention_levels or self.codebook_size),
            "model.encoder_layers",
            self.encoder_layers,
            "'sd' for a model with attention at its levels or a codebook",
        )

    def _check_latent(self) -> None:
        """Raises ConfigError unless the latent's normalisation is one."""
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            require(
                len(values) in (0, self.latent_channels) and len(values) == len(self.latent_mean),
                f"model.{name}",
                values,
                f"a mean and a deviation for each of model.latent_channels={self.latent_channels}, or neither",
            )
        require(all(s > 0 for s in self.latent_std), "model.latent_std", self.latent_std, "positive numbers")
        require(self.latent_patch >= 1, "model.latent_patch", self.latent_patch, "at least 1")
        scaled = bool(self.latent_mean or self.codebook_size or self.shift_factor or self.scaling_factor != 1)
        require(
            self.batch_norm_epsilon == 0 or (self.batch_norm_epsilon > 0 and not scaled),
            "model.batch_norm_epsilon",
            self.batch_norm_epsilon,
            "0; or above, with model.scaling_factor=1 and no shift, latent_mean or codebook",
        )
        require(
            not (self.latent_mean and self.shift_factor),
            "model.shift_factor",
            self.shift_factor,
            "0 beside model.latent_mean",
        )

    def encoder_fields(self) -> dict[str, Any]:
        """What describes the encoder and the latent: all but the decoder's sizes, and how it is computed."""
        others = (
            "decoder_channels", "decoder_blocks", "decoder_layers", "condition", "condition_mask", "mask_reduction",
            "tone_field", "dtype", "remat",
        )  # fmt: skip
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in others}

    @property
    def encoder_outputs(self) -> int:
        """Channels that the encoder ends with: the latent's, or their means and log variances."""
        return self.latent_channels if self.codebook_size else 2 * self.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels of the image per pixel of the latent, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))
