"""Reads Stable Diffusion, a diffusers folder or an original checkpoint; all configuration before any weight."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import diffusers_to_config, ldm_model, ldm_to_config, read_model
from asymvq_jax.convert.mapping import Weight, from_torch
from asymvq_jax.diffusion import clip, mapping, schedulers, unet
from asymvq_jax.diffusion.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder, TransformerConfig
from asymvq_jax.diffusion.schedulers import Kind, SchedulerConfig
from asymvq_jax.diffusion.tokens import Tokenizer, read_tokenizer
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.errors import PipelineError
from asymvq_jax.files.weights import PICKLES, misfits, read_folder, read_json, read_shapes, read_tensors, weight_files
from asymvq_jax.models.autoencoder import Autoencoder, in_dtype
from asymvq_jax.models.parameters import merge, split

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nnx.Module)
Task = Literal["text", "inpaint", "edit"]
# Names of the weights, of which transformers has had two.
UNET_WEIGHTS, CLIP_WEIGHTS = "diffusion_pytorch_model", ("model", "pytorch_model")
# The parts of a folder that each task takes, by the file that has to be there.
PARTS: dict[Task, tuple[str, ...]] = {
    "text": ("text_encoder/config.json", "tokenizer"),
    "inpaint": ("text_encoder/config.json", "tokenizer"),
    "edit": ("image_encoder/config.json",),
}
COMMON_PARTS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@dataclass(frozen=True)
class Description:
    """What a pipeline is, from its configuration alone."""

    path: Path
    task: Task
    unet: UNetConfig
    autoencoder: ModelConfig
    scheduler: SchedulerConfig
    encoder: TextConfig | ImageConfig
    # text and inpaint have the first, edit the second.
    tokenizer: Tokenizer | None = None
    example: clip.ExampleConfig | None = None
    # An original checkpoint's tensors by their part, or only the shapes where the file has a head.
    parts: Mapping[str, Mapping[str, np.ndarray | jax.ShapeDtypeStruct]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pipeline:
    """Stable Diffusion for one task, its weights on the default device."""

    task: Task
    unet: UNet
    # The one whose encoder the UNet was trained with; its own decoder is the plain one.
    autoencoder: Autoencoder
    scheduler: SchedulerConfig
    # text and inpaint have the first two, edit the others.
    text_encoder: TextEncoder | None = None
    tokenizer: Tokenizer | None = None
    image_encoder: ImageEncoder | None = None
    example: clip.ExampleConfig | None = None


def describe(path: str | Path, task: Task, scheduler: Kind | None = None) -> Description:
    """Reads the configuration of a diffusers pipeline folder, and checks that it can do the task.

    Args:
        path: the folder.
        task: what it is wanted for.
        scheduler: another sampler than the folder's own, on its noise schedule.

    Raises:
        UserError: no pipeline, a missing part, or one of a kind that we do not have; no weight has been read.
    """
    path = Path(path)
    if not path.is_dir():
        raise PipelineError(f"no pipeline at {path}: expected a diffusers pipeline folder (or an original checkpoint)")
    missing = [part for part in (*COMMON_PARTS, *PARTS[task]) if not (path / part).exists()]
    if missing:
        whole = len(missing) == len(COMMON_PARTS) + len(PARTS[task])
        raise PipelineError(
            f"{path} {'is no diffusers pipeline folder' if whole else 'is not complete'} for {task!r}: "
            f"missing {', '.join(missing)}"
        )

    def stored(part: str) -> tuple[dict[str, Any], str]:
        return read_json(path / part), str(path / part)

    encoder_file = PARTS[task][0]
    parts: dict[str, Any]
    if task == "edit":
        parts = {"encoder": clip.read_image_config(*stored(encoder_file)), "example": _example(path)}
    else:
        parts = {"encoder": clip.read_text_config(*stored(encoder_file))}
        parts["tokenizer"] = read_tokenizer(path / "tokenizer", parts["encoder"])
    description = Description(
        path=path,
        task=task,
        unet=_unet_config(*stored("unet/config.json"), task),
        autoencoder=diffusers_to_config(read_json(path / "vae/config.json"), path / "vae/config.json"),
        scheduler=_scheduler_config(*stored("scheduler/scheduler_config.json"), task, scheduler),
        **parts,
    )
    _check_channels(task, description.unet, description.autoencoder, str(path / "unet/config.json"))
    _check_context(description.unet, description.encoder, str(path))
    weight_files(path / "unet", UNET_WEIGHTS)
    weight_files(path / "vae", UNET_WEIGHTS)
    weight_files((path / encoder_file).parent, *CLIP_WEIGHTS)
    return description


def _unet_config(stored: dict[str, Any], name: str, task: Task) -> UNetConfig:
    """As `unet.read_config`, but old files' sample_size is what diffusers' pipelines take for it."""
    config = unet.read_config(stored, name)
    version = [int(n) for n in re.findall(r"\d+", str(stored.get("_diffusers_version", "0.9")))[:2]]
    if task != "edit" and version < [0, 9] and config.sample_size < 64:
        log.warning("%s: sample_size=%d is taken for 64, as it is an old file", name, config.sample_size)
        config = replace(config, sample_size=64)
    return config


def _scheduler_config(stored: dict[str, Any], name: str, task: Task, kind: Kind | None) -> SchedulerConfig:
    """As `schedulers.read_config`, but with the options that diffusers' pipelines for the task set whatever it says."""
    always = {"text": {"steps_offset": 1, "clip_sample": False}, "inpaint": {"steps_offset": 1, "skip_prk_steps": True}}
    changes = always.get(task, {})
    for option in changes.keys() & stored.keys():
        if stored[option] != changes[option]:
            log.warning("%s: %s=%r is taken for %r, as diffusers does", name, option, stored[option], changes[option])
    return schedulers.read_config({**stored, **changes}, name, kind)


def _example(path: Path) -> clip.ExampleConfig:
    file = path / "feature_extractor" / "preprocessor_config.json"
    return clip.read_example_config(read_json(file) if file.is_file() else {}, str(file))


def _check_channels(task: Task, config: UNetConfig, autoencoder: ModelConfig, name: str) -> None:
    latent = autoencoder.latent_channels
    expected = latent if task == "text" else 2 * latent + 1
    if config.out_channels != latent:
        raise PipelineError(f"{name}: out_channels={config.out_channels}; the autoencoder's latents have {latent}")
    if config.in_channels != expected:
        kinds = {latent: "a text-to-image model", 2 * latent + 1: "an inpainting model"}
        kind = kinds.get(config.in_channels, "a model for another task")
        raise PipelineError(
            f"{name}: in_channels={config.in_channels}, which is {kind}; {task!r} needs {expected}: "
            + ("noisy latent" if task == "text" else "noisy latent, mask, and the masked picture's latent")
        )


def _check_context(config: UNetConfig, encoder: TextConfig | ImageConfig, name: str) -> None:
    width = encoder.outputs if isinstance(encoder, ImageConfig) else encoder.transformer.channels
    if config.context != width:
        raise PipelineError(
            f"{name}: the UNet attends to features of {config.context} channels, and the encoder gives {width}"
        )


def load(description: Description, dtype: str = "float32") -> Pipeline:
    """Reads the weights of a described pipeline.

    Args:
        description: from `describe` or `describe_checkpoint`.
        dtype: in which everything is computed, and kernels are kept; norms stay in float32.

    Raises:
        UserError: tensors that are missing, unexpected or misshapen, all of them listed.
    """
    read = _read_folder if description.parts is None else _read_checkpoint
    return Pipeline(
        task=description.task,
        scheduler=description.scheduler,
        tokenizer=description.tokenizer,
        example=description.example,
        **read(description, dtype),
    )


def _read_folder(description: Description, dtype: str) -> dict[str, nnx.Module]:
    path = description.path
    if description.task == "edit":
        encoder = {"image_encoder": read_image_encoder(path / "image_encoder", dtype)}
    else:
        encoder = {"text_encoder": read_text_encoder(path / "text_encoder", dtype)}
    return {**encoder, "unet": read_unet(path / "unet", dtype), "autoencoder": read_model(path / "vae", dtype=dtype)}


def _read_checkpoint(description: Description, dtype: str) -> dict[str, nnx.Module]:
    path, parts = description.path, description.parts
    if not _is_pickle(path):
        parts = _checkpoint_parts(read_tensors(path), path)
    open_clip = _is_open_clip(parts[CHECKPOINT_TEXT])
    text = _text_tensors(parts[CHECKPOINT_TEXT], description.encoder, open_clip)
    unet_tensors = mapping.flatten_projections(parts[CHECKPOINT_UNET])
    return {
        "text_encoder": _text_encoder(description.encoder, text, "ldm" if open_clip else "diffusers", path, dtype),
        "unet": _unet(description.unet, unet_tensors, "ldm", path, dtype),
        "autoencoder": in_dtype(ldm_model(parts[CHECKPOINT_VAE], path, {}), dtype),
    }


def place(pipeline: Pipeline, mesh: Mesh) -> Pipeline:
    """The pipeline with the UNet and the autoencoder on every device of `mesh`, so that no call copies them there."""
    parts = {name: inference.place(getattr(pipeline, name), mesh) for name in ("unet", "autoencoder")}
    return replace(pipeline, **parts)


def _build(
    make: Callable[[], M],
    name: Callable[[M], Sequence[Weight]],
    tensors: Mapping[str, np.ndarray],
    source: Path | str,
    dtype: DTypeLike,
) -> M:
    """The module that `make` makes, filled with `tensors`; kernels and embeddings are kept in `dtype`."""
    abstract = nnx.eval_shape(make)
    named = name(abstract)
    if problems := misfits(tensors, {w.name: w.torch_shape for w in named}):
        raise PipelineError(f"{source}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    params = {}
    for weight in named:
        array = from_torch(weight, tensors[weight.name])
        params[weight.path] = jnp.asarray(array, dtype if weight.path.endswith((".kernel", ".embedding")) else None)
    return merge(split(abstract)[0], params)


def read_unet(folder: Path, dtype: str = "float32") -> UNet:
    """Reads the folder of a diffusers UNet2DConditionModel.

    Raises:
        UserError: a UNet that we do not have, or tensors that do not fit.
    """
    config = unet.read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _unet(config, mapping.flatten_projections(read_folder(folder, UNET_WEIGHTS)), "diffusers", folder, dtype)


def _unet(config: UNetConfig, tensors: Mapping[str, np.ndarray], form: str, source: Path | str, dtype: str) -> UNet:
    return _build(
        lambda: UNet(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)),
        lambda model: mapping.unet_weights(model, form),
        tensors,
        source,
        dtype,
    )


def _read_clip(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """Tensors under transformers' present names; older ones had a prefix, and the positions' numbers as a tensor."""
    tensors = read_folder(folder, *CLIP_WEIGHTS)
    return {name.replace(prefix, "", 1): x for name, x in tensors.items() if not name.endswith("position_ids")}


def read_text_encoder(folder: Path, dtype: str = "float32") -> TextEncoder:
    """Reads the folder of a transformers CLIPTextModel.

    Raises:
        UserError: an encoder that we do not have, or tensors that do not fit.
    """
    config = clip.read_text_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _text_encoder(config, _read_clip(folder, "text_model."), "diffusers", folder, dtype)


def _text_encoder(
    config: TextConfig, tensors: Mapping[str, np.ndarray], form: str, source: Path | str, dtype: str
) -> TextEncoder:
    return _build(
        lambda: TextEncoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)),
        lambda model: mapping.text_weights(model, form),
        tensors,
        source,
        dtype,
    )


def read_image_encoder(folder: Path, dtype: str = "float32") -> ImageEncoder:
    """Reads the folder of Paint-by-Example's image encoder.

    Raises:
        UserError: an encoder that we do not have, or tensors that do not fit.
    """
    config = clip.read_image_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _build(
        lambda: ImageEncoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)),
        mapping.image_weights,
        _read_clip(folder, "vision_model."),
        folder,
        dtype,
    )


# An original checkpoint's parts by the beginning of their names, and what is no part of the function.
CHECKPOINT_UNET, CHECKPOINT_TEXT, CHECKPOINT_VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
TRANSFORMERS_PREFIX, OPEN_CLIP_PREFIX = "transformer.text_model.", "model."
CHECKPOINT_UNUSED = re.compile(
    r"model_ema\..*|betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip.*|"
    r"posterior_.*|logvar|lvlb_weights|scale_factor|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)|"
    r"cond_stage_model\.logit_scale|.*\.position_ids"
)
# Stable Diffusion's noise schedule, which a checkpoint does not name.
NOISE_SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip


def describe_checkpoint(
    path: str | Path,
    task: Task,
    tokenizer: str | None,
    *,
    scheduler: Kind | None = None,
    prediction_type: str | None = None,
) -> Description:
    """As `describe`, but of an original Stable Diffusion 1 or 2 checkpoint, with all its parts in one file.

    Args:
        path: .safetensors, of which only the head is read; or a pickle such as .ckpt, which is read as a whole.
        task: "text" or "inpaint".
        tokenizer: a folder with CLIP's tokenizer, which a checkpoint does not have.
        scheduler: the sampler; DDIM by default.
        prediction_type: "epsilon" or "v_prediction"; Stable Diffusion 1 has the first, 2 must be told.

    Raises:
        UserError: the file is no such checkpoint, or cannot do the task; or something has to be told.
    """
    path = Path(path)
    if task == "edit":
        raise PipelineError(f"{path}: 'edit' takes a diffusers pipeline folder of Paint-by-Example")
    if not path.is_file():
        raise PipelineError(f"no checkpoint at {path}: expected an original Stable Diffusion checkpoint (a file)")
    if tokenizer is None:
        raise PipelineError(f"{path} is an original checkpoint, which has no tokenizer: name one by --tokenizer")
    parts = _checkpoint_parts((read_tensors if _is_pickle(path) else read_shapes)(path), path)
    config, two = _unet_sizes(parts[CHECKPOINT_UNET], path)
    if two and prediction_type is None:
        raise PipelineError(
            f"{path} is a Stable Diffusion 2, which predicts the noise or v, and the file does not say which: give "
            "--prediction-type epsilon (such as 2-base) or v_prediction (such as 2.1 for 768 px)"
        )
    prediction = prediction_type or "epsilon"
    if two and prediction == "v_prediction":
        config = replace(config, sample_size=96)
    autoencoder = ldm_to_config(parts[CHECKPOINT_VAE], path)
    _check_channels(task, config, autoencoder, str(path))
    text_config = _text_sizes(parts[CHECKPOINT_TEXT], path)
    _check_context(config, text_config, str(path))
    stored = {**NOISE_SCHEDULE, "prediction_type": prediction}
    # OpenCLIP fills up with token 0, whatever the folder says, which may be CLIP's.
    pad = 0 if _is_open_clip(parts[CHECKPOINT_TEXT]) else None
    return Description(
        path=path,
        task=task,
        unet=config,
        autoencoder=autoencoder,
        scheduler=schedulers.read_config(stored, str(path), scheduler),
        encoder=text_config,
        tokenizer=read_tokenizer(Path(tokenizer), text_config, pad),
        parts=parts,
    )


def _is_pickle(path: Path) -> bool:
    return path.suffix != ".safetensors"


def _is_open_clip(tensors: Mapping[str, np.ndarray | jax.ShapeDtypeStruct]) -> bool:
    return any(".resblocks." in name for name in tensors)


T = TypeVar("T", np.ndarray, jax.ShapeDtypeStruct)


def _checkpoint_parts(tensors: Mapping[str, T], path: Path) -> dict[str, dict[str, T]]:
    """An original checkpoint's tensors by their part, without its prefix."""
    parts: dict[str, dict[str, T]] = {p: {} for p in (CHECKPOINT_UNET, CHECKPOINT_TEXT, CHECKPOINT_VAE)}
    outside = []
    for name, value in tensors.items():
        if CHECKPOINT_UNUSED.fullmatch(name):
            continue
        prefix = next((p for p in parts if name.startswith(p)), None)
        if prefix is None:
            outside.append(name)
        else:
            parts[prefix][name.removeprefix(prefix)] = value
    missing = [f"{p}*" for p, part in parts.items() if not part]
    if missing or outside:
        more = [f"and {len(outside) - 5} more"] if len(outside) > 5 else []
        raise PipelineError(
            f"{path} is no original Stable Diffusion checkpoint: "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("missing", missing), ("unexpected", outside[:5] + more))
                if names
            )
        )
    return parts


def _unet_sizes(tensors: Mapping[str, np.ndarray | jax.ShapeDtypeStruct], path: Path) -> tuple[UNetConfig, bool]:
    """The sizes of an original checkpoint's UNet, and whether it is Stable Diffusion 2's."""
    halvings = sorted(int(m[1]) for n in tensors if (m := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", n)))
    key = next((n for n in tensors if n.endswith("attn2.to_k.weight")), None)
    if not halvings or key is None or "input_blocks.0.0.weight" not in tensors or "out.2.weight" not in tensors:
        raise PipelineError(f"{path}: the UNet is not Stable Diffusion's: no halvings, cross-attention or ends")
    per_level, levels = halvings[0], len(halvings) + 1
    firsts = [1 + i * per_level for i in range(levels)]
    widths = [f"input_blocks.{n}.0.out_layers.3.weight" for n in firsts]
    if absent := [name for name in widths if name not in tensors]:
        raise PipelineError(f"{path}: the UNet is not Stable Diffusion's: missing {', '.join(absent)}")
    channels = tuple(tensors[name].shape[0] for name in widths)
    two = tensors["middle_block.1.proj_in.weight"].ndim == 2
    config = UNetConfig(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        blocks=per_level - 1,
        attention=tuple(f"input_blocks.{n}.1.norm.weight" in tensors for n in firsts),
        # 1 has eight heads everywhere, 2 heads of 64 channels.
        heads=tuple(c // 64 for c in channels) if two else (8,) * levels,
        context=tensors[key].shape[1],
    )
    return config, two


def _text_sizes(tensors: Mapping[str, np.ndarray | jax.ShapeDtypeStruct], path: Path) -> TextConfig:
    """The sizes of an original checkpoint's text encoder."""
    open_clip = _is_open_clip(tensors)
    stripped = {
        name.removeprefix(OPEN_CLIP_PREFIX if open_clip else TRANSFORMERS_PREFIX): x for name, x in tensors.items()
    }
    block = r"transformer\.resblocks\.(\d+)\." if open_clip else r"encoder\.layers\.(\d+)\."
    numbers = {int(m[1]) for n in stripped if (m := re.match(block, n))}
    tokens = stripped.get("token_embedding.weight" if open_clip else "embeddings.token_embedding.weight")
    positions = stripped.get("positional_embedding" if open_clip else "embeddings.position_embedding.weight")
    inner = stripped.get(("transformer.resblocks.0.mlp.c_fc" if open_clip else "encoder.layers.0.mlp.fc1") + ".bias")
    if not numbers or tokens is None or positions is None or inner is None:
        raise PipelineError(f"{path}: {CHECKPOINT_TEXT}* is no text encoder of CLIP or OpenCLIP")
    transformer = TransformerConfig(
        channels=tokens.shape[1],
        inner=inner.shape[0],
        # Stable Diffusion 2 takes the last block but one's result, so the last is no part of the function.
        layers=len(numbers) - open_clip,
        heads=max(1, tokens.shape[1] // 64),
        activation="gelu" if open_clip else "quick_gelu",
        epsilon=1e-5,
    )
    return TextConfig(transformer, vocabulary=tokens.shape[0], length=positions.shape[0])


def _text_tensors(tensors: Mapping[str, np.ndarray], config: TextConfig, open_clip: bool) -> dict[str, np.ndarray]:
    """An original checkpoint's text encoder as its table has it."""
    if not open_clip:
        return {name.removeprefix(TRANSFORMERS_PREFIX): value for name, value in tensors.items()}
    last = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{config.transformer.layers}."
    kept = {n.removeprefix(OPEN_CLIP_PREFIX): x for n, x in tensors.items() if not n.startswith(last)}
    return mapping.split_joint(kept)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is the name of an original checkpoint's file, and no folder's."""
    return Path(path).suffix in (".safetensors", *PICKLES) and not Path(path).is_dir()
