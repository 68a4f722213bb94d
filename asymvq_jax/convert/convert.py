"""Recognises what a source holds, reads it into a model, and writes a model in the form that is asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.mapping import OLD_ATTENTION, Format, dump_tensors, model_from_tensors, weights
from asymvq_jax.errors import CheckpointError, ConvertError
from asymvq_jax.files.weights import misfits, read_folder, read_json, read_tensors, write_tensors
from asymvq_jax.models.autoencoder import Autoencoder, in_dtype
from asymvq_jax.models.checkpoints import find_step, load_model, save_model

log = logging.getLogger(__name__)

Target = Literal["jax", "diffusers", "ldm"]
PREFIX = "first_stage_model."
# In an original checkpoint, but no part of the autoencoder's function: loss networks, unused layers, averages.
LDM_UNUSED = ("loss.", "decoder.up_layers.", "model_ema.")
WEIGHTS = "diffusion_pytorch_model"
KINDS = ("AsymmetricAutoencoderKL", "AutoencoderKL", "VQModel")


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
            AsymmetricAutoencoderKL, AutoencoderKL or VQModel, or a pipeline with one in vae/ or vqvae/; or an original
            checkpoint of the asymmetric model, of Stable Diffusion or of a Latent Diffusion first stage (.ckpt or
            .safetensors).
        target: a directory for jax and diffusers; for ldm a .safetensors or .ckpt file. It must not exist.
        to: the form to write.
        scaling_factor: that of an original checkpoint that is read or written, which does not hold it; by default 1 for
            a VQ model, else Stable Diffusion 1's.
        shift_factor: likewise; by default 0.

    Raises:
        UserError: the source is unreadable, incomplete or not representable, or the target exists.
    """
    target = Path(target)
    given = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    told = {name: value for name, value in given.items() if value is not None}
    if target.exists():
        raise ConvertError(f"{target} exists already; choose another target or remove it first")
    if to == "ldm" and target.suffix not in (".safetensors", ".ckpt"):
        raise ConvertError(f"{target}: expected a name that ends in .safetensors or .ckpt for --to ldm")
    if told and to != "ldm" and not Path(source).is_file():
        raise ConvertError(
            f"{' and '.join(told)}: only original checkpoints have to be told; {source} has a configuration that tells"
        )
    model = read_model(source, told)
    if to == "jax":
        save_model(target, model)
    elif to == "diffusers":
        _write_diffusers(model, target)
    else:
        _check_ldm(model.config, told)
        _atomically(target, lambda path: write_tensors(path, dump_tensors(model, "ldm")))
    return model


def read_model(source: str | Path, told: Mapping[str, float] | None = None, *, dtype: str | None = None) -> Autoencoder:
    """Reads a model of any kind that `convert` knows.

    Args:
        source: as for `convert`; a JAX checkpoint may also be in a bucket (gs://).
        told: fields of its config that an original checkpoint's file cannot tell.
        dtype: in which it computes; by default as its config says.

    Raises:
        UserError: there is nothing, or nothing that is known, or it is incomplete.
    """
    model = load_model(source) if "://" in str(source) else _read_local(Path(source), told or {})
    return model if dtype is None else in_dtype(model, dtype)


def _read_local(source: Path, told: Mapping[str, float]) -> Autoencoder:
    if source.is_file():
        return _read_ldm(source, told)
    for folder in (source, source / "vae", source / "vqvae"):
        if (folder / "config.json").is_file():
            return _read_diffusers(folder)
    try:
        find_step(source)
    except CheckpointError as error:
        raise ConvertError(f"{error}; or a diffusers folder (with a config.json), or an original checkpoint") from None
    log.info("%s: a JAX checkpoint", source)
    return load_model(source)


def _read_diffusers(folder: Path) -> Autoencoder:
    stored = read_json(folder / "config.json")
    config = diffusers_to_config(stored, folder / "config.json")
    tensors = {_modern(name): value for name, value in read_folder(folder, WEIGHTS).items()}
    # 1x1 convolutions and linear layers hold the same numbers; old files have the former in the attention.
    tensors = {
        name: value[:, :, 0, 0] if ".attentions." in name and value.shape[2:] == (1, 1) else value
        for name, value in tensors.items()
    }
    log.info("%s: diffusers %s", folder, stored["_class_name"])
    return _build(config, tensors, "diffusers", folder)


def _modern(name: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\..*)", name)
    return match[1] + OLD_ATTENTION[match[2]] + match[3] if match and match[2] in OLD_ATTENTION else name


def _expect(config: Mapping[str, Any], path: Path, **expected: Any) -> None:
    wrong = [f"{n}={config[n]!r} (expected {v!r})" for n, v in expected.items() if n in config and config[n] != v]
    if wrong:
        raise ConvertError(f"{path}: this model is of a kind that is not supported: {', '.join(wrong)}")


def diffusers_to_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Translates a diffusers config.json.

    Raises:
        ConvertError: another class, or a field with a value that our model does not have.
    """
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise ConvertError(f"{path}: _class_name is {kind!r}; expected one of {', '.join(KINDS)}")
    asymmetric, vq = kind == "AsymmetricAutoencoderKL", kind == "VQModel"
    names = (
        ("down_block_out_channels", "up_block_out_channels", "layers_per_down_block", "layers_per_up_block")
        if asymmetric
        else ("block_out_channels", "block_out_channels", "layers_per_block", "layers_per_block")
    )
    needed = {*names, "latent_channels", *(["num_vq_embeddings"] if vq else [])}
    missing = sorted(name for name in needed if name not in config)
    if missing:
        raise ConvertError(f"{path}: missing {', '.join(missing)}")
    down, up, down_blocks, up_blocks = (config[name] for name in names)
    channels = config.get("in_channels", 3)
    attention = tuple(i for i, block in enumerate(config.get("down_block_types", ())) if block.startswith("Attn"))
    _expect(
        config,
        path,
        act_fn="silu",
        out_channels=channels,
        use_post_quant_conv=config.get("use_quant_conv", True),
        norm_type="group",
        vq_embed_dim=config["latent_channels"] if config.get("vq_embed_dim") else None,
        latents_mean=None,
        latents_std=None,
        **_block_types(len(down), attention),
    )
    return ModelConfig(
        image_channels=channels,
        latent_channels=config["latent_channels"],
        scaling_factor=config.get("scaling_factor", 0.18215),
        shift_factor=config.get("shift_factor") or 0.0,
        encoder_channels=tuple(down),
        decoder_channels=tuple(up),
        encoder_blocks=down_blocks,
        decoder_blocks=up_blocks,
        attention_levels=attention,
        mid_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True),
        codebook_size=config["num_vq_embeddings"] if vq else 0,
        condition=asymmetric,
        norm_groups=config.get("norm_num_groups", 32),
    )


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


def _write_diffusers(model: Autoencoder, target: Path) -> None:
    config = config_to_diffusers(model.config)
    tensors = dump_tensors(model, "diffusers")
    if not model.config.quant_conv and config["_class_name"] != "AutoencoderKL":
        log.info("diffusers' %s has 1x1 convolutions around the latent: identities are written", config["_class_name"])
        tensors |= _identities(model.config)

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_tensors(folder / f"{WEIGHTS}.safetensors", tensors)

    _atomically(target, write)


def _identities(config: ModelConfig) -> dict[str, np.ndarray]:
    """1x1 convolutions around the latent that change nothing, as PyTorch tensors."""
    tensors = {}
    for name, channels in (("quant_conv", config.encoder_outputs), ("post_quant_conv", config.latent_channels)):
        tensors[f"{name}.weight"] = np.eye(channels, dtype=np.float32)[:, :, None, None]
        tensors[f"{name}.bias"] = np.zeros(channels, np.float32)
    return tensors


def _atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a path beside `target`, then renames it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(beside / target.name)
        (beside / target.name).rename(target)
    finally:
        shutil.rmtree(beside)


def _untold(vq: bool) -> dict[str, Any]:
    """What an original checkpoint is taken to have where nobody says otherwise."""
    default = ModelConfig()
    # Latent Diffusion leaves the latents of its VQ models as they are.
    scaling = 1.0 if vq else default.scaling_factor
    return {"norm_groups": default.norm_groups, "scaling_factor": scaling, "shift_factor": default.shift_factor}


def _check_ldm(config: ModelConfig, told: Mapping[str, float]) -> None:
    """Raises ConvertError where a file of tensors alone would be read as another model."""
    assumed = _untold(bool(config.codebook_size)) | told
    lost = [f"model.{n}={getattr(config, n)} (taken for {v})" for n, v in assumed.items() if getattr(config, n) != v]
    if lost:
        raise ConvertError(
            f"an original checkpoint holds no configuration, so it cannot say {' and '.join(lost)}; use --to diffusers,"
            " or give the latent's by --scaling-factor and --shift-factor, here and whenever the file is read"
        )


def _read_ldm(path: Path, told: Mapping[str, float]) -> Autoencoder:
    return ldm_model(read_tensors(path), path, told)


def ldm_model(tensors: Mapping[str, np.ndarray], path: Path, told: Mapping[str, float]) -> Autoencoder:
    """The autoencoder of an original checkpoint's tensors, which may be those of a whole Stable Diffusion.

    Args:
        tensors: by their names in the file.
        path: the file, for messages.
        told: the fields of the configuration that a file cannot tell.

    Raises:
        ConvertError: the tensors of an autoencoder are not complete or do not fit.
    """
    if any(name.startswith(PREFIX) for name in tensors):
        outside = [name for name in tensors if not name.startswith(PREFIX)]
        log.info("%s: %d tensors outside %s* are no part of the autoencoder", path, len(outside), PREFIX)
        tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    unused = [name for name in tensors if name.startswith(LDM_UNUSED)]
    if unused:
        log.info("%s: left out %d tensors of %s", path, len(unused), ", ".join(f"{p}*" for p in LDM_UNUSED))
    tensors = {name: value for name, value in tensors.items() if name not in unused}
    config = dataclasses.replace(ldm_to_config(tensors, path), **told)
    log.info(
        "%s: an original checkpoint%s; it does not say how a diffusion model scales the latent: assumed are a scaling "
        "factor of %s and a shift of %s",
        path,
        "" if config.condition else " of an autoencoder without condition branch",
        config.scaling_factor,
        config.shift_factor,
    )
    return _build(config, tensors, "ldm", path)


def ldm_to_config(tensors: Mapping[str, np.ndarray], path: Path) -> ModelConfig:
    """Reads the sizes off the tensors of an original checkpoint.

    Raises:
        ConvertError: tensors that every such checkpoint has are missing.
    """

    def channels(half: str) -> tuple[int, ...]:
        pattern = re.compile(rf"{half}\.(\d+)\.block\.0\.conv1\.weight")
        found = {int(m[1]): v.shape[0] for name, v in tensors.items() if (m := pattern.fullmatch(name))}
        return tuple(found[level] for level in sorted(found))

    def blocks(half: str) -> int:
        return sum(bool(re.fullmatch(rf"{half}\.0\.block\.\d+\.conv1\.weight", name)) for name in tensors)

    needed = [f"{n}.weight" for n in ("encoder.conv_in", "encoder.down.0.block.0.conv1", "decoder.conv_in",
                                      "decoder.up.0.block.0.conv1")]  # fmt: skip
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ConvertError(f"{path} holds no autoencoder under the original names: missing {', '.join(missing)}, ...")
    widths = channels("encoder.down")
    codebook_size = len(tensors.get("quantize.embedding.weight", ()))
    return ModelConfig(
        **_untold(bool(codebook_size)),
        image_channels=tensors["encoder.conv_in.weight"].shape[1],
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        encoder_channels=widths,
        decoder_channels=channels("decoder.up"),
        encoder_blocks=blocks("encoder.down"),
        decoder_blocks=blocks("decoder.up") - 1,
        attention_levels=tuple(i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        mid_attention="encoder.mid.attn_1.q.weight" in tensors,
        quant_conv="quant_conv.weight" in tensors,
        codebook_size=codebook_size,
        condition=any(name.startswith("decoder.encoder.") for name in tensors),
    )


def _build(config: ModelConfig, tensors: Mapping[str, np.ndarray], form: Format, source: Path) -> Autoencoder:
    """A model with all of `tensors` in it; lists every one that is missing, unexpected or misshapen."""
    if problems := misfits(tensors, {w.name: w.torch_shape for w in weights(config, form)}):
        raise ConvertError(f"{source}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    return model_from_tensors(config, tensors, form)


def describe(model: Autoencoder) -> str:
    """One line on a model's sizes."""
    counts = {half: 0 for half in ("encoder", "codebook", "decoder", "condition")}
    for weight in weights(model.config, "diffusers"):
        half = "condition" if weight.path.startswith("decoder.condition.") else weight.path.split(".")[0]
        if half in counts:
            counts[half] += int(np.prod(weight.shape))
    parts = ", ".join(f"{half} {count / 1e6:.1f} M" for half, count in counts.items() if count)
    return f"{parts} parameters; decoder {model.config.decoder_channels} x {model.config.decoder_blocks} + 1 blocks"
