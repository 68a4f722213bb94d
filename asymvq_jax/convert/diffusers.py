"""The config.json of diffusers' autoencoders and our configuration, in both directions."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.fields import COUNT, COUNTS, NUMBER, SWITCH, TEXTS, without_nulls, wrong_fields

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
KINDS = ("AsymmetricAutoencoderKL", "AutoencoderKL", "VQModel")
# diffusers' other autoencoders, and what they are.
OTHERS = {
    "AutoencoderTiny": "TAESD's kind, a tiny autoencoder with other layers",
    "ConsistencyDecoderVAE": "a decoder that is a diffusion model",
    "AutoencoderKLTemporalDecoder": "a video model's autoencoder",
    "AutoencoderDC": "a deep compression autoencoder with other layers",
    "AutoencoderKLFlux2": "FLUX.2's autoencoder, whose latents are normalised by batch statistics",
}


def diffusers_to_config(stored: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translates a diffusers config.json, in which null is as good as nothing.

    Raises:
        ConvertError: another class, a field of another type, or with a value that our model does not have.
    """
    kind = stored.get("_class_name")
    if kind not in KINDS:
        video = "a video model's autoencoder" if str(kind).startswith("AutoencoderKL") and kind != KINDS[1] else ""
        what = OTHERS.get(str(kind), video)
        raise ConvertError(
            f"{path}: _class_name is {kind!r}{f' ({what})' if what else ''}; expected one of {', '.join(KINDS)}"
        )
    config = without_nulls(stored)
    asymmetric, vq = kind == "AsymmetricAutoencoderKL", kind == "VQModel"
    names = (
        ("down_block_out_channels", "up_block_out_channels", "layers_per_down_block", "layers_per_up_block")
        if asymmetric
        else ("block_out_channels", "block_out_channels", "layers_per_block", "layers_per_block")
    )
    needed = {*names, "latent_channels", *(["num_vq_embeddings"] if vq else [])}
    if missing := sorted(name for name in needed if name not in config):
        raise ConvertError(f"{path}: missing {', '.join(missing)}")
    if wrong := wrong_fields(config, TYPES):
        raise ConvertError(f"{path}: {', '.join(wrong)}")
    down, up, down_blocks, up_blocks = (config[name] for name in names)
    channels = config.get("in_channels", 3)
    attention = tuple(i for i, block in enumerate(config.get("down_block_types", ())) if block.startswith("Attn"))
    default = ModelConfig()
    if "scaling_factor" not in config:
        log.info("%s has no scaling_factor: using diffusers' default, %s", path, default.scaling_factor)
    _expect(
        config,
        path,
        act_fn="silu",
        out_channels=channels,
        use_post_quant_conv=config.get("use_quant_conv", True),
        norm_type="group",
        vq_embed_dim=config["latent_channels"],
        latents_mean=None,
        latents_std=None,
        **_block_types(len(down), attention),
    )
    return ModelConfig(
        image_channels=channels,
        latent_channels=config["latent_channels"],
        scaling_factor=config.get("scaling_factor", default.scaling_factor),
        shift_factor=config.get("shift_factor", 0.0),
        encoder_channels=tuple(down),
        decoder_channels=tuple(up),
        encoder_blocks=down_blocks,
        decoder_blocks=up_blocks,
        attention_levels=attention,
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        codebook_size=config["num_vq_embeddings"] if vq else 0,
        condition=asymmetric,
        norm_groups=config.get("norm_num_groups", default.norm_groups),
    )


# What the fields that are read hold.
TYPES = {
    **dict.fromkeys(("scaling_factor", "shift_factor"), NUMBER),
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), SWITCH),
    **dict.fromkeys(("block_out_channels", "down_block_out_channels", "up_block_out_channels"), COUNTS),
    **dict.fromkeys(("down_block_types", "up_block_types"), TEXTS),
    **dict.fromkeys(
        (
            "in_channels", "out_channels", "latent_channels", "layers_per_block", "layers_per_down_block",
            "layers_per_up_block", "norm_num_groups", "num_vq_embeddings", "vq_embed_dim",
        ),
        COUNT,
    ),
}  # fmt: skip


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
    """The config.json of a model: AsymmetricAutoencoderKL with a condition branch, AutoencoderKL or VQModel without.

    Raises:
        ConvertError: diffusers' class has no room for the model.
    """
    shared = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        **_block_types(len(config.encoder_channels), config.attention_levels),
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
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
        for name, value in (("mid_attention", True), ("codebook_size", 0), ("shift_factor", 0))
        if getattr(config, name) != value
    ]
    _check_diffusers("AsymmetricAutoencoderKL", problems)
    return shared | {
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_out_channels": list(config.encoder_channels),
        "layers_per_down_block": config.encoder_blocks,
        "up_block_out_channels": list(config.decoder_channels),
        "layers_per_up_block": config.decoder_blocks,
    }


def _symmetric(config: ModelConfig) -> dict[str, Any]:
    """What the config.json of a model without condition branch has of its own."""
    kind = "VQModel" if config.codebook_size else "AutoencoderKL"
    problems = [
        f"model.decoder_{name}={getattr(config, f'decoder_{name}')} unlike the encoder's {encoder}"
        for name, encoder in (("channels", config.encoder_channels), ("blocks", config.encoder_blocks))
        if getattr(config, f"decoder_{name}") != encoder
    ]
    if config.codebook_size and config.shift_factor:
        problems.append(f"model.shift_factor={config.shift_factor}")
    _check_diffusers(kind, problems)
    fields = {
        "_class_name": kind,
        "block_out_channels": list(config.encoder_channels),
        "layers_per_block": config.encoder_blocks,
        "mid_block_add_attention": config.mid_attention,
    }
    if config.codebook_size:
        return fields | {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    return fields | {
        "shift_factor": config.shift_factor or None,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }


def _check_diffusers(kind: str, problems: list[str]) -> None:
    if problems:
        raise ConvertError(
            f"diffusers' {kind} cannot hold {' and '.join(problems)}; --to ldm writes the weights under their original "
            "names"
        )
