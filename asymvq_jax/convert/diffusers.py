"""The config.json of diffusers' autoencoders and our configuration, in both directions."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.fields import (
    COUNT,
    COUNTS,
    FEW,
    NUMBER,
    NUMBERS,
    SWITCH,
    SWITCHES,
    TEXTS,
    without_nulls,
    wrong_fields,
)

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
# diffusers' class of the layers of `ModelConfig.encoder_layers` that come from video models.
VIDEO = {"wan": "AutoencoderKLWan", "qwen-image": "AutoencoderKLQwenImage"}
KINDS = ("AsymmetricAutoencoderKL", "AutoencoderKL", "AutoencoderKLFlux2", "VQModel", *VIDEO.values())
# diffusers' other autoencoders, and what they are.
OTHERS = {
    "AutoencoderTiny": "TAESD's kind, a tiny autoencoder with other layers",
    "ConsistencyDecoderVAE": "a decoder that is a diffusion model",
    "AutoencoderKLTemporalDecoder": "a video model's autoencoder",
    "AutoencoderDC": "a deep compression autoencoder with other layers",
}

# A latent that is scaled and shifted, and nothing else.
PLAIN_LATENT = {"latent_mean": (), "latent_patch": 1, "batch_norm_epsilon": 0}


def diffusers_to_config(stored: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translates a diffusers config.json, in which null is as good as nothing.

    Raises:
        ConvertError: another class, a field of another type, or with a value that our model does not have.
    """
    kind = stored.get("_class_name")
    if kind not in KINDS:
        video = "a video model's autoencoder" if str(kind).startswith("AutoencoderKL") else ""
        what = OTHERS.get(str(kind), video)
        if str(kind).removeprefix("Flax") in KINDS:
            what = "Flax's, which older diffusers converts: from_pretrained(FOLDER, from_flax=True)"
        raise ConvertError(
            f"{path}: _class_name is {kind!r}{f' ({what})' if what else ''}; expected one of {', '.join(KINDS)}"
        )
    config = without_nulls(stored)
    if kind in VIDEO.values():
        return _video_to_config(config, path)
    asymmetric, vq, flux2 = (kind == name for name in ("AsymmetricAutoencoderKL", "VQModel", "AutoencoderKLFlux2"))
    names = (
        ("down_block_out_channels", "up_block_out_channels", "layers_per_down_block", "layers_per_up_block")
        if asymmetric
        else ("block_out_channels", "block_out_channels", "layers_per_block", "layers_per_block")
    )
    extra = {"VQModel": ("num_vq_embeddings",), "AutoencoderKLFlux2": ("batch_norm_eps", "patch_size")}
    _check_fields(config, path, (*names, "latent_channels", *extra.get(str(kind), ())))
    down, up, down_blocks, up_blocks = (config[name] for name in names)
    channels = config.get("in_channels", 3)
    attention = tuple(i for i, block in enumerate(config.get("down_block_types", ())) if block.startswith("Attn"))
    default = ModelConfig()
    # Two names of one function.
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ConvertError(f"{path}: act_fn={config['act_fn']!r}: expected 'silu', which all published models have")
    if "scaling_factor" not in config and not flux2:
        log.info("%s has no scaling_factor: using diffusers' default, %s", path, default.scaling_factor)
    _expect(
        config,
        path,
        out_channels=channels,
        use_post_quant_conv=config.get("use_quant_conv", True),
        norm_type="group",
        vq_embed_dim=config["latent_channels"],
        latents_mean=None,
        latents_std=None,
        **({"patch_size": [config["patch_size"][0]] * 2, "scaling_factor": 1.0, "shift_factor": 0.0} if flux2 else {}),
        **_block_types(len(down), attention),
    )
    return ModelConfig(
        image_channels=channels,
        latent_channels=config["latent_channels"],
        scaling_factor=config.get("scaling_factor", 1.0 if flux2 else default.scaling_factor),
        shift_factor=config.get("shift_factor", 0.0),
        latent_patch=config["patch_size"][0] if flux2 else 1,
        batch_norm_epsilon=config["batch_norm_eps"] if flux2 else 0.0,
        encoder_channels=tuple(down),
        decoder_channels=tuple(config.get("decoder_block_out_channels", up) if flux2 else up),
        encoder_blocks=down_blocks,
        decoder_blocks=up_blocks,
        attention_levels=attention,
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        codebook_size=config["num_vq_embeddings"] if vq else 0,
        condition=asymmetric,
        norm_groups=config.get("norm_num_groups", default.norm_groups),
    )


def _video_to_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translates the configuration of Wan's or Qwen-Image's autoencoder."""
    kind = next(layers for layers, name in VIDEO.items() if name == config["_class_name"])
    needed = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std")
    _check_fields(config, path, needed)
    if config.get("is_residual") or config.get("patch_size"):
        raise ConvertError(
            f"{path}: this is Wan 2.2's autoencoder (is_residual, patch_size), whose blocks are not supported; Wan "
            "2.1's is"
        )
    channels = config.get("in_channels" if kind == "wan" else "input_channels", 3)
    _expect(config, path, attn_scales=[], out_channels=channels)
    widths, halved = config["dim_mult"], config["temperal_downsample"]
    if widths[0] != 1 or len(halved) != len(widths) - 1:
        raise ConvertError(
            f"{path}: dim_mult={widths}, temperal_downsample={halved} (expected 1, ..., and one value fewer)"
        )
    return ModelConfig(
        image_channels=channels,
        latent_channels=config["z_dim"],
        scaling_factor=1.0,
        latent_mean=tuple(config["latents_mean"]),
        latent_std=tuple(config["latents_std"]),
        encoder_layers=kind,
        decoder_layers=kind,
        temporal_levels=tuple(i for i, over_time in enumerate(halved) if over_time),
        encoder_channels=tuple(config["base_dim"] * width for width in widths),
        decoder_channels=tuple(config.get("decoder_base_dim", config["base_dim"]) * width for width in widths),
        encoder_blocks=config["num_res_blocks"],
        decoder_blocks=config["num_res_blocks"],
        condition=False,
    )


def _video_from_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of Wan's or Qwen-Image's autoencoder."""
    kind = VIDEO[config.encoder_layers]
    base, decoder_base = config.encoder_channels[0], config.decoder_channels[0]
    multiples = [width // base for width in config.encoder_channels]
    same = {
        "encoder_channels": tuple(base * m for m in multiples),
        "decoder_channels": tuple((decoder_base if config.encoder_layers == "wan" else base) * m for m in multiples),
        "decoder_blocks": config.encoder_blocks,
        "decoder_layers": config.encoder_layers,
        "mid_attention": True,
        "quant_conv": True,
        "condition": False,
        "scaling_factor": 1.0,
    }
    problems = [f"model.{n}={getattr(config, n)} (expected {v})" for n, v in same.items() if getattr(config, n) != v]
    problems += [] if config.latent_mean else ["model.latent_mean=()"]
    _check_diffusers(kind, problems, original=False)
    own = (
        {"in_channels": config.image_channels, "out_channels": config.image_channels, "is_residual": False,
         "decoder_base_dim": None if decoder_base == base else decoder_base,
         "scale_factor_spatial": config.downsampling, "scale_factor_temporal": 2 ** len(config.temporal_levels)}
        if config.encoder_layers == "wan"
        else {"input_channels": config.image_channels}
    )  # fmt: skip
    return own | {
        "_class_name": kind,
        "base_dim": base,
        "z_dim": config.latent_channels,
        "dim_mult": multiples,
        "num_res_blocks": config.encoder_blocks,
        "attn_scales": [],
        "temperal_downsample": [i in config.temporal_levels for i in range(len(multiples) - 1)],
        "dropout": 0.0,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
    }


# What the fields that are read hold.
TYPES = {
    **dict.fromkeys(("scaling_factor", "shift_factor", "batch_norm_eps"), NUMBER),
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), SWITCH),
    **dict.fromkeys(("block_out_channels", "down_block_out_channels", "up_block_out_channels",
                     "decoder_block_out_channels"), COUNTS),
    **dict.fromkeys(("down_block_types", "up_block_types"), TEXTS),
    **dict.fromkeys(("layers_per_block", "layers_per_down_block", "layers_per_up_block"), FEW),
    **dict.fromkeys(
        (
            "in_channels", "out_channels", "latent_channels", "norm_num_groups", "num_vq_embeddings", "vq_embed_dim",
        ),
        COUNT,
    ),
}  # fmt: skip


# Those of video models' autoencoders.
VIDEO_TYPES = {
    **dict.fromkeys(("base_dim", "decoder_base_dim", "z_dim"), COUNT),
    **dict.fromkeys(("in_channels", "input_channels", "out_channels"), COUNT),
    "num_res_blocks": FEW,
    "dim_mult": COUNTS,
    "temperal_downsample": SWITCHES,
    **dict.fromkeys(("latents_mean", "latents_std"), NUMBERS),
}


def _check_fields(config: Mapping[str, Any], path: Path, needed: Sequence[str]) -> None:
    if missing := sorted({name for name in needed if name not in config}):
        raise ConvertError(f"{path}: missing {', '.join(missing)}")
    if wrong := wrong_fields(config, VIDEO_TYPES if config["_class_name"] in VIDEO.values() else TYPES):
        raise ConvertError(f"{path}: {', '.join(wrong)}")


def _expect(config: Mapping[str, Any], path: Path, **expected: Any) -> None:
    wrong = [f"{n}={config[n]!r} (expected {v!r})" for n, v in expected.items() if n in config and config[n] != v]
    if wrong:
        raise ConvertError(f"{path}: this kind of model is not supported: {', '.join(wrong)}")


def _block_types(levels: int, attention: Container[int]) -> dict[str, list[str]]:
    """diffusers' names of the levels, in the order in which they run, given those with attention (0: outermost)."""
    prefixes = ["Attn" if i in attention else "" for i in range(levels)]
    return {
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(prefixes)],
    }


def config_to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model: AsymmetricAutoencoderKL with a condition branch, or the encoder's own class without.

    Raises:
        ConvertError: diffusers' class has no room for the model.
    """
    if not config.condition and config.encoder_layers != "sd":
        return _video_from_config(config)
    shared = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        **_block_types(len(config.encoder_channels), config.attention_levels),
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": 256,
    }
    if not config.condition:
        return shared | _symmetric(config)
    first, last = config.decoder_channels[0], config.decoder_channels[-1]
    doubling = tuple(min(first * 2**i, last) for i in range(4))
    problems = []
    if config.decoder_channels != doubling:
        problems.append(f"model.decoder_channels={config.decoder_channels} (its condition branch needs {doubling})")
    problems += [
        f"model.{name}={getattr(config, name)}"
        for name, value in (
            ("mid_attention", True),
            ("codebook_size", 0),
            ("shift_factor", 0),
            ("condition_mask", False),
            ("mask_reduction", "nearest"),
            *PLAIN_LATENT.items(),
        )
        if getattr(config, name) != value
    ]
    problems += [] if config.encoder_layers == "sd" else [f"model.encoder_layers={config.encoder_layers}"]
    _check_diffusers("AsymmetricAutoencoderKL", problems, original=config.encoder_layers == "sd")
    return shared | {
        "scaling_factor": config.scaling_factor,
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_out_channels": list(config.encoder_channels),
        "layers_per_down_block": config.encoder_blocks,
        "up_block_out_channels": list(config.decoder_channels),
        "layers_per_up_block": config.decoder_blocks,
    }


def _symmetric(config: ModelConfig) -> dict[str, Any]:
    """What the config.json of a model without condition branch has of its own."""
    flux2 = config.batch_norm_epsilon > 0
    kind = "VQModel" if config.codebook_size else "AutoencoderKLFlux2" if flux2 else "AutoencoderKL"
    problems = [
        f"model.decoder_{name}={getattr(config, f'decoder_{name}')} unlike the encoder's {encoder}"
        for name, encoder in (("channels", config.encoder_channels), ("blocks", config.encoder_blocks))
        if getattr(config, f"decoder_{name}") != encoder and not (flux2 and name == "channels")
    ]
    problems += [f"model.{n}={getattr(config, n)}" for n, v in PLAIN_LATENT.items() if getattr(config, n) != v
                 and not (flux2 and n != "latent_mean")]  # fmt: skip
    if config.codebook_size and config.shift_factor:
        problems.append(f"model.shift_factor={config.shift_factor}")
    _check_diffusers(kind, problems)
    fields = {
        "_class_name": kind,
        "block_out_channels": list(config.encoder_channels),
        "layers_per_block": config.encoder_blocks,
        "mid_block_add_attention": config.mid_attention,
    }
    if flux2:
        return fields | {
            "decoder_block_out_channels": list(config.decoder_channels),
            "use_quant_conv": config.quant_conv,
            "use_post_quant_conv": config.quant_conv,
            "batch_norm_eps": config.batch_norm_epsilon,
            "patch_size": [config.latent_patch] * 2,
        }
    fields["scaling_factor"] = config.scaling_factor
    if config.codebook_size:
        return fields | {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    return fields | {
        "shift_factor": config.shift_factor or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }


def _check_diffusers(kind: str, problems: list[str], *, original: bool = True) -> None:
    if problems:
        advice = "--to ldm writes the weights under their original names" if original else "keep the JAX checkpoint"
        raise ConvertError(f"diffusers' {kind} cannot hold {' and '.join(problems)}; {advice}")
