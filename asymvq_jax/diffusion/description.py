"""What a pipeline of Stable Diffusion is, from its configuration and its files' heads, before any weight is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.families import FAMILIES, family_of
from asymvq_jax.convert.reading import Described
from asymvq_jax.convert.reading import describe as describe_autoencoder
from asymvq_jax.convert.sources import locate
from asymvq_jax.diffusion import clip, schedulers, unet
from asymvq_jax.diffusion.clip import ImageConfig, TextConfig
from asymvq_jax.diffusion.original import Original, find_parts
from asymvq_jax.diffusion.schedulers import Kind, SchedulerConfig
from asymvq_jax.diffusion.tokens import Tokenizer, read_tokenizer
from asymvq_jax.diffusion.unet import SIZES, UNetConfig
from asymvq_jax.errors import PipelineError, UserError
from asymvq_jax.files.fields import COUNT, COUNTS, NUMBER, ONE_OR_MORE, TEXTS, wrong_fields
from asymvq_jax.files.weights import SUFFIXES, open_weights, read_json, weight_files

log = logging.getLogger(__name__)

Task = Literal["text", "inpaint", "edit"]
# Names of the weights, of which transformers has had two.
UNET_WEIGHTS, CLIP_WEIGHTS = "diffusion_pytorch_model", ("model", "pytorch_model")
# The parts of a folder that each task takes, by the file that has to be there.
PARTS: dict[Task, tuple[str, ...]] = {
    "text": ("text_encoder/config.json", "tokenizer"),
    "inpaint": ("text_encoder/config.json", "tokenizer"),
    "edit": ("image_encoder/config.json",),
}
# What XL has beside that for text and inpaint.
XL_PARTS = ("text_encoder_2/config.json", "tokenizer_2")
# How the names of its pipelines begin.
XL = "StableDiffusionXL"
COMMON_PARTS = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@dataclass(frozen=True)
class Description:
    """What a pipeline is, from its configuration alone."""

    path: Path
    task: Task
    unet: UNetConfig
    vae: Described
    scheduler: SchedulerConfig
    encoder: TextConfig | ImageConfig
    # text and inpaint have the first, edit the second.
    tokenizer: Tokenizer | None = None
    example: clip.ExampleConfig | None = None
    # XL's second encoder of texts, and whether nothing's features are zeros.
    encoder_2: TextConfig | None = None
    tokenizer_2: Tokenizer | None = None
    zeros: bool = False
    # The parts of an original checkpoint; None: a diffusers folder.
    original: Original | None = field(default=None, repr=False)

    @property
    def autoencoder(self) -> ModelConfig:
        """That of the pipeline's own autoencoder."""
        return self.vae.config


def describe(
    path: str | Path, task: Task, scheduler: Kind | None = None, factors: Mapping[str, float] | None = None
) -> Description:
    """Reads the configuration of a diffusers pipeline folder, and checks that it can do the task.

    Args:
        path: the folder.
        task: the one to check for.
        scheduler: another sampler than the folder's own, on its noise schedule.
        factors: `scaling_factor` and `shift_factor`, where the folder does not say them.

    Raises:
        UserError: no pipeline, or a part that is missing or not supported; no weight has been read.
    """
    path = locate(path)
    if not path.is_dir():
        raise PipelineError(f"no pipeline at {path}: expected a diffusers pipeline folder (or an original checkpoint)")
    index = _check_family(path)
    try:
        return _describe_folder(path, task, index, scheduler, factors)
    except UserError as error:
        if not str(index.get("_class_name")).startswith(XL):
            raise
        raise PipelineError(f"{path}, a pipeline of Stable Diffusion XL: {error}") from None


def _describe_folder(
    path: Path,
    task: Task,
    index: Mapping[str, Any],
    scheduler: Kind | None,
    factors: Mapping[str, float] | None,
) -> Description:
    missing = [part for part in (*COMMON_PARTS, *PARTS[task]) if not (path / part).exists()]
    if missing:
        whole = len(missing) == len(COMMON_PARTS) + len(PARTS[task])
        raise PipelineError(
            f"{path} is not {'a diffusers pipeline folder' if whole else 'complete'} for {task!r}: "
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
    unet_config = _unet_config(*stored("unet/config.json"), task)
    if unet_config.added:
        if task == "edit" or (absent := [part for part in XL_PARTS if not (path / part).exists()]):
            what = "'edit' takes Paint-by-Example" if task == "edit" else f"missing {', '.join(absent)}"
            raise PipelineError(f"{path} has Stable Diffusion XL's UNet: {what}")
        parts["encoder_2"] = clip.read_text_config(*stored(XL_PARTS[0]))
        parts["tokenizer_2"] = read_tokenizer(path / XL_PARTS[1], parts["encoder_2"])
        parts["zeros"] = index.get("force_zeros_for_empty_prompt", True)
        weight_files((path / XL_PARTS[0]).parent, *CLIP_WEIGHTS)
    vae = describe_autoencoder(path / "vae", factors)
    if vae is None:
        raise PipelineError(f"{path / 'vae'} is not a diffusers autoencoder")
    # XL's pipelines take the file as it is.
    scheduler_config = _scheduler_config(
        *stored("scheduler/scheduler_config.json"), "edit" if unet_config.added else task, scheduler
    )
    _check_channels(task, unet_config, vae.config, str(path / "unet/config.json"))
    _check_context(unet_config, parts["encoder"], str(path), parts.get("encoder_2"))
    weight_files(path / "unet", UNET_WEIGHTS)
    weight_files((path / encoder_file).parent, *CLIP_WEIGHTS)
    return Description(path=path, task=task, unet=unet_config, vae=vae, scheduler=scheduler_config, **parts)


def _check_family(path: Path) -> dict[str, Any]:
    """Its model_index.json, if it has one; raises PipelineError where that says that it is of another family."""
    file = path / "model_index.json"
    if not file.is_file():
        return {}
    index = read_json(file)
    kind = str(index.get("_class_name"))
    if kind.startswith(tuple(beginning for beginning, _ in FAMILIES)) and not kind.startswith(XL):
        raise PipelineError(
            f"{path} is a pipeline of {family_of(kind)} ({kind}); only Stable Diffusion 1, 2 and XL are supported"
        )
    if index.get("requires_aesthetics_score"):
        raise PipelineError(f"{path} is Stable Diffusion XL's refiner, which is not supported; name the base pipeline")
    return index


# What the fields of a UNet's config.json hold, and those that cannot be null.
UNET_NEEDED = ("block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types")
UNET_TYPES = {
    "block_out_channels": COUNTS, "down_block_types": TEXTS, "up_block_types": TEXTS, "in_channels": COUNT,
    "out_channels": COUNT, "attention_head_dim": ONE_OR_MORE, "norm_num_groups": COUNT, "norm_eps": NUMBER,
}  # fmt: skip


def _unet_config(stored: dict[str, Any], name: str, task: Task) -> UNetConfig:
    """As `unet.read_config`, but old files' sample_size is what diffusers' pipelines take for it."""
    if wrong := wrong_fields({n: v for n, v in stored.items() if v is not None or n in UNET_NEEDED}, UNET_TYPES):
        raise PipelineError(f"{name}: {', '.join(wrong)}")
    config = unet.read_config({n: v for n, v in stored.items() if v is not None}, name)
    version = [int(n) for n in re.findall(r"\d+", str(stored.get("_diffusers_version", "0.9")))[:2]]
    if task != "edit" and version < [0, 9] and config.sample_size < 64:
        log.warning(
            "%s: sample_size=%d is read as 64: diffusers does so with files before 0.9", name, config.sample_size
        )
        config = replace(config, sample_size=64)
    return config


def _scheduler_config(stored: dict[str, Any], name: str, task: Task, kind: Kind | None) -> SchedulerConfig:
    """As `schedulers.read_config`, with the options that diffusers' pipelines for the task always override."""
    always = {"text": {"steps_offset": 1, "clip_sample": False}, "inpaint": {"steps_offset": 1, "skip_prk_steps": True}}
    changes = always.get(task, {})
    for option in changes.keys() & stored.keys():
        if stored[option] != changes[option]:
            log.warning("%s: %s=%r is read as %r, as diffusers does", name, option, stored[option], changes[option])
    return schedulers.read_config({**stored, **changes}, name, kind)


def _example(path: Path) -> clip.ExampleConfig:
    file = path / "feature_extractor" / "preprocessor_config.json"
    return clip.read_example_config(read_json(file) if file.is_file() else {}, str(file))


def _check_channels(task: Task, config: UNetConfig, autoencoder: ModelConfig, name: str) -> None:
    latent = autoencoder.latent_channels
    # Inpainting's, or also any text-to-image model, whose picture the loop keeps.
    expected = {"text": (latent,), "inpaint": (2 * latent + 1, latent), "edit": (2 * latent + 1,)}[task]
    if config.out_channels != latent:
        raise PipelineError(
            f"{name}: out_channels={config.out_channels}; expected {latent}, as the autoencoder's latents have"
        )
    if config.in_channels not in expected:
        kinds = {latent: "a text-to-image model", 2 * latent + 1: "an inpainting model"}
        kind = kinds.get(config.in_channels, "a model for another task")
        raise PipelineError(
            f"{name}: in_channels={config.in_channels}, which is {kind}; {task!r} needs "
            f"{' or '.join(map(str, expected))}: noisy latent"
            + ("" if task == "text" else ", mask, and the masked picture's latent")
        )


def _check_context(
    config: UNetConfig, encoder: TextConfig | ImageConfig, name: str, second: TextConfig | None = None
) -> None:
    width = encoder.outputs if isinstance(encoder, ImageConfig) else encoder.transformer.channels
    if second is not None:
        width += second.transformer.channels
        if config.pooled != second.projection:
            raise PipelineError(
                f"{name}: the UNet expects a pooled text of {config.pooled} channels beside {SIZES} numbers of "
                f"{config.added_time}; text_encoder_2's has {second.projection}"
            )
    if config.context != width:
        raise PipelineError(
            f"{name}: the UNet expects features of {config.context} channels; the encoder's have {width}"
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
    factors: Mapping[str, float] | None = None,
) -> Description:
    """As `describe`, but of an original Stable Diffusion 1 or 2 checkpoint, with all its parts in one file.

    Args:
        path: the file, safetensors or PyTorch's, of which only names and shapes are read.
        task: "text" or "inpaint".
        tokenizer: a folder with CLIP's tokenizer, which a checkpoint does not have.
        scheduler: the sampler; DDIM by default.
        prediction_type: "epsilon" or "v_prediction"; Stable Diffusion 1 has the first; needed for 2 where
            the file does not say it.
        factors: `scaling_factor` and `shift_factor`, where the file does not say them.

    Raises:
        UserError: the file is not such a checkpoint, or does not fit the task, or an option is needed and missing.
    """
    path = locate(path)
    if task == "edit":
        raise PipelineError(f"{path}: 'edit' takes a diffusers pipeline folder of Paint-by-Example")
    if not path.is_file():
        raise PipelineError(f"no checkpoint at {path}: expected an original Stable Diffusion checkpoint (a file)")
    if tokenizer is None:
        raise PipelineError(f"{path} is an original checkpoint, which has no tokenizer: name one by --tokenizer")
    original = find_parts(open_weights(path), factors or {})
    config, prediction = original.unet, prediction_type or original.prediction
    if original.two and prediction is None:
        raise PipelineError(
            f"{path} is a Stable Diffusion 2, which predicts the noise or v, and the file does not say which: give "
            "--prediction-type epsilon (such as 2-base) or v_prediction (such as 2.1 for 768 px)"
        )
    if original.two and prediction == "v_prediction":
        config = replace(config, sample_size=96)
    _check_channels(task, config, original.autoencoder.config, str(path))
    _check_context(config, original.text, str(path))
    stored = {**NOISE_SCHEDULE, "prediction_type": prediction or "epsilon"}
    # 2's encoder was trained on texts filled up with token 0, which the tokenizer's folder may not say.
    pad = 0 if original.two else None
    return Description(
        path=path,
        task=task,
        unet=config,
        vae=original.autoencoder,
        scheduler=schedulers.read_config(stored, str(path), scheduler),
        encoder=original.text,
        tokenizer=read_tokenizer(Path(tokenizer), original.text, pad),
        original=original,
    )


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a file, or named like one: an original checkpoint, and not a folder."""
    return Path(path).is_file() or (Path(path).suffix in SUFFIXES and not Path(path).is_dir())
