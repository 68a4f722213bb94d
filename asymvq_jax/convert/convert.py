"""Converts a model of any kind to any other; nothing is written unless everything fits, and then whole."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.diffusers import WEIGHTS, config_to_diffusers, diffusers_to_config
from asymvq_jax.convert.mapping import BATCHES, Format, dump_each, weights
from asymvq_jax.convert.reading import describe as describe_source
from asymvq_jax.convert.reading import given_factors, read_model
from asymvq_jax.convert.sources import in_bucket
from asymvq_jax.errors import ConvertError, OutputError
from asymvq_jax.files import addresses
from asymvq_jax.files.outputs import try_out, writing
from asymvq_jax.files.weights import check_space, check_target, write_atomically, write_tensors
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import checkpoint_path, save_model

__all__ = ["config_to_diffusers", "convert", "describe", "diffusers_to_config", "given_factors", "read_model"]
log = logging.getLogger(__name__)

Target = Literal["jax", "diffusers", "ldm"]


def convert(
    source: str | Path,
    target: str | Path,
    to: Target = "jax",
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> Autoencoder:
    """Converts a model; nothing is written unless everything fits.

    Args:
        source: a JAX checkpoint (a run, a step, or what this function wrote); a diffusers folder of
            AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLWan (2.1), AutoencoderKLQwenImage
            or VQModel, or a pipeline with one in vae/ or vqvae/; or a file of weights, safetensors or PyTorch's, that
            holds an autoencoder like these, alone or in a whole diffusion model.
        target: a directory for jax, also in a bucket (gs://...), and for diffusers; for ldm a .safetensors or .ckpt
            file. It must not exist.
        to: the form to write.
        scaling_factor: where the source does not say it.
        shift_factor: likewise.

    Raises:
        UserError: the source is unreadable, incomplete or not representable, or the target exists or cannot be written.
    """
    factors = given_factors(scaling_factor, shift_factor)
    if addresses.in_bucket(target):
        return _convert_into_bucket(source, str(target), to, factors)
    target = Path(target)
    if to == "ldm" and target.suffix not in (".safetensors", ".ckpt"):
        raise ConvertError(f"{target}: expected a name that ends in .safetensors or .ckpt for --to ldm")
    check_target(target)
    described = None if in_bucket(source) else describe_source(source, factors)
    if described is not None:
        _check(described.config, target, to)
        model = described.load()
    else:
        model = read_model(source, factors)
        _check(model.config, target, to)
    if to == "jax":
        write_atomically(target, lambda path: save_model(path, model))
    elif to == "diffusers":
        write_atomically(target, lambda path: _write_diffusers(model, path))
    else:
        write_atomically(target, lambda path: _write_original(model, path))
    return model


def _convert_into_bucket(source: str | Path, target: str, to: Target, factors: Mapping[str, float]) -> Autoencoder:
    """As `convert`; other programs read their weights from disks."""
    if to != "jax":
        addresses.check_local(target, "--out", "write it here, and copy it there")
    path = checkpoint_path(target)
    with writing(target):
        if path.exists():
            raise OutputError(f"{target} exists already; choose another target or remove it first")
        try_out(path.parent)
    model = read_model(source, factors)
    save_model(target, model)
    return model


def _check(config: ModelConfig, target: Path, to: Target) -> None:
    """Raises UserError where the target's form cannot hold the model, or its disk has no room for it."""
    if to == "diffusers":
        config_to_diffusers(config)
    if to == "ldm" and (config.encoder_layers != "sd" or config.latent_mean):
        what = f"model.encoder_layers={config.encoder_layers}" if config.encoder_layers != "sd" else "model.latent_mean"
        raise ConvertError(f"--to ldm: there is no original form of a model with {what}; choose jax or diffusers")
    needed = 4 * sum(math.prod(weight.shape) for weight in weights(config, "diffusers"))
    # JAX checkpoints are compressed, trained weights by a tenth.
    check_space(target, needed // 2 if to == "jax" else needed)


def _write_original(model: Autoencoder, path: Path) -> None:
    config = model.config
    # What the tensors do not show, for us and for whoever looks.
    beside = {
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "norm_groups": config.norm_groups,
        **({"batch_norm_epsilon": config.batch_norm_epsilon} if config.batch_norm_epsilon else {}),
        "mask_area_any": int(config.mask_reduction == "area-any"),
    }
    write_tensors(path, dump_each(model, "ldm"), _shapes(config, "ldm"), (BATCHES,), **beside)


def _write_diffusers(model: Autoencoder, folder: Path) -> None:
    config = config_to_diffusers(model.config)
    shapes, tensors = _shapes(model.config, "diffusers"), dump_each(model, "diffusers")
    if not model.config.quant_conv and "use_quant_conv" not in config:
        log.info("diffusers' %s has 1x1 convolutions around the latent: identities are written", config["_class_name"])
        identities = _identities(model.config)
        shapes |= {name: x.shape for name, x in identities.items()}
        tensors = (pair for pairs in (tensors, identities.items()) for pair in pairs)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / f"{WEIGHTS}.safetensors", tensors, shapes, (BATCHES,))


def _shapes(config: ModelConfig, form: Format) -> dict[str, tuple[int, ...]]:
    return {w.name: w.torch_shape for w in weights(config, form)}


def _identities(config: ModelConfig) -> dict[str, np.ndarray]:
    """1x1 convolutions around the latent that change nothing, as PyTorch tensors."""
    tensors = {}
    for name, channels in (("quant_conv", config.encoder_outputs), ("post_quant_conv", config.latent_channels)):
        tensors[f"{name}.weight"] = np.eye(channels, dtype=np.float32)[:, :, None, None]
        tensors[f"{name}.bias"] = np.zeros(channels, np.float32)
    return tensors


def describe(model: Autoencoder) -> str:
    """One line on a model's sizes."""
    counts = {half: 0 for half in ("encoder", "codebook", "decoder", "condition")}
    for weight in weights(model.config, "diffusers"):
        half = "condition" if weight.path.startswith("decoder.condition.") else weight.path.split(".")[0]
        if half in counts:
            counts[half] += math.prod(weight.shape)
    parts = ", ".join(f"{half} {count / 1e6:.1f} M" for half, count in counts.items() if count)
    return f"{parts} parameters; decoder {model.config.decoder_channels} x {model.config.decoder_blocks} + 1 blocks"
