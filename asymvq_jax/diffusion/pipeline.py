"""Stable Diffusion's parts with their weights: reads what `description` describes, from a folder or from one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from asymvq_jax import inference
from asymvq_jax.convert.mapping import Weight
from asymvq_jax.convert.reading import fill
from asymvq_jax.diffusion import clip, lora, mapping, unet
from asymvq_jax.diffusion.clip import ImageEncoder, TextConfig, TextEncoder
from asymvq_jax.diffusion.description import (
    CLIP_WEIGHTS,
    UNET_WEIGHTS,
    Description,
    Task,
    describe,
    describe_checkpoint,
    is_checkpoint,
)
from asymvq_jax.diffusion.lora import Lora
from asymvq_jax.diffusion.original import Original, without_unused
from asymvq_jax.diffusion.schedulers import SchedulerConfig
from asymvq_jax.diffusion.tokens import Tokenizer
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.errors import PipelineError
from asymvq_jax.files.stored import Table, fitted, misfits
from asymvq_jax.files.weights import open_folder, read_json
from asymvq_jax.models.autoencoder import Autoencoder, in_dtype
from asymvq_jax.models.parameters import merge, seeded, split

__all__ = [
    "Description",
    "Pipeline",
    "Task",
    "describe",
    "describe_checkpoint",
    "is_checkpoint",
    "load",
    "place",
    "read_image_encoder",
    "read_text_encoder",
    "read_unet",
]

M = TypeVar("M", bound=nnx.Module)


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
    # XL's second encoder of texts; and whether nothing's features are zeros, and not those of an empty text.
    text_encoder_2: TextEncoder | None = None
    tokenizer_2: Tokenizer | None = None
    zeros: bool = False


def load(description: Description, dtype: str = "float32", loras: Sequence[Lora] = ()) -> Pipeline:
    """Reads the weights of a described pipeline.

    Args:
        description: from `describe` or `describe_checkpoint`.
        dtype: in which everything is computed, and kernels are kept; norms stay in float32.
        loras: from `lora.read`, merged into UNet and text encoder in float32.

    Raises:
        UserError: tensors that are missing, unexpected, misshapen or not finite, all of them listed; or a LoRA that
            does not fit.
    """
    described, path, original = description, description.path, description.original
    changes = lora.match(loras, _names(described)) if loras else {}
    changed = {part: partial(lora.apply, changes=of_part) for part, of_part in changes.items()}
    text_encoder = image_encoder = second = None
    if original is not None:
        text_encoder = _original_text_encoder(original, dtype, changed.get("text_encoder", _same))
        tensors = changed.get("unet", _same)(original.unet_tensors)
        network = _unet(described.unet, tensors, "ldm", path, dtype)
    else:
        network = read_unet(path / "unet", dtype, changed.get("unet", _same))
        if described.task == "edit":
            image_encoder = read_image_encoder(path / "image_encoder", dtype)
        else:
            text_encoder = read_text_encoder(path / "text_encoder", dtype, changed.get("text_encoder", _same))
        if described.encoder_2 is not None:
            second = read_text_encoder(path / "text_encoder_2", dtype, changed.get("text_encoder_2", _same))
    return Pipeline(
        task=described.task,
        unet=network,
        autoencoder=in_dtype(described.vae.load(), dtype),
        scheduler=described.scheduler,
        text_encoder=text_encoder,
        tokenizer=described.tokenizer,
        image_encoder=image_encoder,
        example=described.example,
        text_encoder_2=second,
        tokenizer_2=described.tokenizer_2,
        zeros=described.zeros,
    )


def _same(tensors: Table) -> Table:
    return tensors


def _names(described: Description) -> dict[str, list[tuple[Weight, ...]]]:
    """The weights of UNet and text encoder by their names in the files, and by those that LoRAs have for them."""
    original, encoder = described.original, described.encoder
    network = nnx.eval_shape(lambda: UNet(described.unet, rngs=seeded(0)))
    ways = ("diffusers" if original is None else "ldm", "diffusers", "ldm")
    names = {"unet": list(zip(*(mapping.unet_weights(network, form) for form in ways), strict=True))}
    forms = ("ldm" if original is not None and original.open_clip else "diffusers", "diffusers")
    for part, config in (("text_encoder", encoder), ("text_encoder_2", described.encoder_2)):
        if isinstance(config, TextConfig):
            text = nnx.eval_shape(partial(_text_model, config))
            names[part] = list(zip(*(mapping.text_weights(text, form) for form in forms), strict=True))
    return names


def _text_model(config: TextConfig) -> TextEncoder:
    return TextEncoder(config, rngs=seeded(0))


def _original_text_encoder(original: Original, dtype: str, changed: Callable[[Table], Table]) -> TextEncoder:
    form = "ldm" if original.open_clip else "diffusers"
    return _text_encoder(original.text, changed(without_unused(original)), form, original.path, dtype)


def place(pipeline: Pipeline, mesh: Mesh) -> Pipeline:
    """The pipeline with the UNet and the autoencoder on every device of `mesh`, so that no call copies them there."""
    parts = {name: inference.place(getattr(pipeline, name), mesh) for name in ("unet", "autoencoder")}
    return replace(pipeline, **parts)


def _build(
    make: Callable[[], M], name: Callable[[M], Sequence[Weight]], tensors: Table, source: Path | str, dtype: str
) -> M:
    """The module that `make` makes, filled with `tensors`; kernels and embeddings are kept in `dtype`."""
    abstract = nnx.eval_shape(make)
    named = name(abstract)
    expected = {w.name: w.torch_shape for w in named}
    tensors = fitted(tensors, expected)
    if problems := misfits(tensors, expected):
        raise PipelineError(f"{source}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    kept = (".kernel", ".embedding")
    params = fill(named, tensors, source, PipelineError, lambda path: dtype if path.endswith(kept) else None)
    model: M = merge(split(abstract)[0], params)
    return model


def read_unet(folder: Path, dtype: str = "float32", changed: Callable[[Table], Table] = _same) -> UNet:
    """Reads the folder of a diffusers UNet2DConditionModel, with what `changed` makes of its tensors.

    Raises:
        UserError: a UNet that we do not have, or tensors that do not fit.
    """
    config = unet.read_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _unet(config, changed(open_folder(folder, UNET_WEIGHTS).tensors), "diffusers", folder, dtype)


def _unet(config: UNetConfig, tensors: Table, form: str, source: Path | str, dtype: str) -> UNet:
    return _build(
        lambda: UNet(config, dtype=jnp.dtype(dtype), rngs=seeded(0)),
        lambda model: mapping.unet_weights(model, form),
        tensors,
        source,
        dtype,
    )


def _clip_tensors(folder: Path, prefix: str) -> Table:
    """Tensors under transformers' present names; older ones had a prefix, and the positions' numbers as a tensor."""
    tensors = open_folder(folder, *CLIP_WEIGHTS).tensors
    return {name.replace(prefix, "", 1): x for name, x in tensors.items() if not name.endswith("position_ids")}


def read_text_encoder(folder: Path, dtype: str = "float32", changed: Callable[[Table], Table] = _same) -> TextEncoder:
    """Reads the folder of a transformers CLIPTextModel, with what `changed` makes of its tensors.

    Raises:
        UserError: an encoder that we do not have, or tensors that do not fit.
    """
    config = clip.read_text_config(read_json(folder / "config.json"), str(folder / "config.json"))
    return _text_encoder(config, changed(_clip_tensors(folder, "text_model.")), "diffusers", folder, dtype)


def _text_encoder(config: TextConfig, tensors: Table, form: str, source: Path | str, dtype: str) -> TextEncoder:
    return _build(
        lambda: TextEncoder(config, dtype=jnp.dtype(dtype), rngs=seeded(0)),
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
        lambda: ImageEncoder(config, dtype=jnp.dtype(dtype), rngs=seeded(0)),
        mapping.image_weights,
        _clip_tensors(folder, "vision_model."),
        folder,
        dtype,
    )
