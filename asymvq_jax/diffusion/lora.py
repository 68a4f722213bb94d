"""LoRA, small changes to a model's weights, merged into the tensors of a UNet and a text encoder as they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from asymvq_jax.convert.mapping import Weight
from asymvq_jax.convert.scaling import CONTEXTS
from asymvq_jax.convert.sources import locate
from asymvq_jax.errors import LoraError
from asymvq_jax.files.stored import StoredTensor, Table
from asymvq_jax.files.weights import open_weights

# The two halves of a layer's change, by the ends of their names: kohya's, peft's, and older ones of diffusers.
DOWN, UP = (
    re.compile(rf"(.+?)\.(?:lora_{kohya}|lora_{peft}(?:\.default)?|lora(?:_linear_layer)?\.{kohya})\.weight")
    for kohya, peft in (("down", "A"), ("up", "B"))
)
# diffusers' first names of the attention's layers, UNet's and text encoder's.
OLD = re.compile(r"(.+?)\.(processor|self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
# What the metadata of peft may say of a change that is not up * down * alpha / rank, with the values of one that is.
PLAIN = {"use_rslora": False, "use_dora": False, "alpha_pattern": {}, "lora_bias": False}
# kohya's beginnings of the layers' names in each part.
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
# Signs of other families in the names of layers.
OTHERS = (
    (r"lora_te[12]_|text_encoder_2\.|label_emb|add_embedding", "Stable Diffusion XL"),
    (r"double_blocks|single_transformer_blocks", "FLUX"),
    (r"joint_blocks|lora_transformer_|^transformer\.", "a diffusion transformer"),
)


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one layer's kernel."""

    up: StoredTensor
    down: StoredTensor
    # Weight * alpha / rank.
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel, as PyTorch has it."""
        return (self.up.shape[0], *self.down.shape[1:])

    def read(self) -> np.ndarray:
        """What is added, float32."""
        rank = self.down.shape[0]
        up, down = self.up.read().reshape(-1, rank), self.down.read().reshape(rank, -1)
        return np.asarray((np.float32(self.scale) * (up @ down)).reshape(self.shape))


@dataclass(frozen=True)
class Lora:
    """A LoRA file: the changes by the names of the layers in it."""

    path: Path
    changes: Mapping[str, Change]


# A part's changes by the names of the tensors that they are added to.
Changes = dict[str, list[Change]]


def read(text: str) -> Lora:
    """Looks into a LoRA file.

    Args:
        text: FILE or FILE:WEIGHT, where the weight, by default 1, is how much of the LoRA is added.

    Raises:
        UserError: no such file, or one with other tensors than those of LoRA layers; all of them are named.
    """
    name, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        name, weight = text, 1.0
    if not name or not np.isfinite(weight):
        raise LoraError(f"--lora {text}: expected FILE or FILE:WEIGHT, such as style.safetensors:0.8")
    opened = open_weights(locate(name))
    ups: dict[str, StoredTensor] = {}
    downs: dict[str, StoredTensor] = {}
    alphas: dict[str, StoredTensor] = {}
    rest: list[str] = []
    for key, tensor in opened.tensors.items():
        if old := OLD.fullmatch(key):
            layer, way = _renamed(*old.groups()[:3]), old[4]
        elif match := DOWN.fullmatch(key) or UP.fullmatch(key):
            layer, way = match[1], "down" if DOWN.fullmatch(key) else "up"
        elif key.endswith(".alpha") and tensor.size == 1:
            alphas[key.removesuffix(".alpha")] = tensor
            continue
        else:
            rest.append(key)
            continue
        (downs if way == "down" else ups)[layer] = tensor
    rest += [f"{layer} (only one of up and down)" for layer in ups.keys() ^ downs.keys()]
    rest += [f"{layer}.alpha" for layer in alphas.keys() - downs.keys()]
    if rest:
        raise LoraError(
            f"{opened.path}: {len(rest)} of {len(opened.tensors)} tensors do not belong to LoRA layers of up, down and "
            f"alpha (LoHa, LoKr, DoRA and others are not supported): {_some(rest)}"
        )
    noted = _metadata(opened.metadata, opened.path)
    changes = {}
    for layer, down in downs.items():
        rank, up = down.shape[0] if down.ndim else 0, ups[layer]
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank or up.size != up.shape[0] * rank:
            raise LoraError(f"{opened.path}: {layer}: up {up.shape} and down {down.shape} do not fit each other")
        alpha = float(alphas[layer].read().item()) if layer in alphas else noted.get(layer.split(".")[0], float(rank))
        changes[layer] = Change(up, down, weight * alpha / rank)
    return Lora(opened.path, changes)


def _renamed(prefix: str, kind: str, which: str) -> str:
    if kind == "self_attn":
        return f"{prefix}.self_attn.{which}_proj"
    return f"{prefix}.to_out.0" if which == "out" else f"{prefix}.to_{which}"


def _metadata(metadata: Mapping[str, str], path: Path) -> dict[str, float]:
    """The alpha of each part ("unet", ...) where diffusers has written it beside the tensors."""
    stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    wrong = [f"{key}={value!r}" for key, value in stored.items() for name, plain in PLAIN.items()
             if key.rpartition(".")[2] == name and (value or None) != (plain or None)]  # fmt: skip
    if wrong:
        raise LoraError(f"{path}: not supported: {', '.join(wrong)}")
    return {key.split(".")[0]: float(value) for key, value in stored.items() if key.endswith(".lora_alpha")}


def match(loras: Sequence[Lora], parts: Mapping[str, Sequence[tuple[Weight, ...]]]) -> dict[str, Changes]:
    """Finds the tensors that LoRAs change.

    Args:
        loras: from `read`.
        parts: "unet", "text_encoder" and XL's "text_encoder_2", each with its weights; of each weight first the one
            with its name in the file that is read, then those with the names that a LoRA may have for it.

    Returns:
        For each part the changes by the names of its tensors.

    Raises:
        LoraError: a layer that no part has, or of another shape; the message says of which model the LoRA is.
    """
    known = {alias: (part, named[0]) for part, weights in parts.items() for named in weights
             for alias in _aliases(part, named)}  # fmt: skip
    found: dict[str, Changes] = {part: {} for part in parts}
    for lora in loras:
        unknown = [layer for layer in lora.changes if layer not in known]
        misshapen = [
            f"{layer} {change.shape}, expected {known[layer][1].torch_shape}"
            for layer, change in lora.changes.items()
            if layer in known and _bare(change.shape) != _bare(known[layer][1].torch_shape)
        ]
        if unknown or misshapen:
            raise LoraError(
                f"{lora.path} does not fit the pipeline{_family(lora, xl='text_encoder_2' in parts)}: "
                + "; ".join(
                    f"{len(wrong)} of {len(lora.changes)} layers {what}: {_some(wrong)}"
                    for wrong, what in ((unknown, "are not in it"), (misshapen, "have another shape"))
                    if wrong
                )
            )
        for layer, change in lora.changes.items():
            part, weight = known[layer]
            found[part].setdefault(weight.name, []).append(change)
    return found


def apply(tensors: Table, changes: Changes) -> Table:
    """The tensors with the changes added to them, each when it is read."""
    return tensors | {name: _changed(tensors[name], added) for name, added in changes.items() if name in tensors}


def _changed(tensor: StoredTensor, changes: Sequence[Change]) -> StoredTensor:
    def load() -> np.ndarray:
        total = tensor.read()
        for change in changes:
            total = total + change.read().reshape(tensor.shape)
        return total

    return replace(tensor, dtype="float32", load=load)


def _aliases(part: str, named: Sequence[Weight]) -> Iterator[str]:
    """A kernel's layer as the tools call it: diffusers and peft with points, kohya without."""
    for weight in named[1:]:
        layer, _, kind = weight.name.rpartition(".")
        if kind != "weight" or len(weight.torch_shape) < 2:
            continue
        # transformers has the projection beside the model.
        inside = "" if part == "unet" or layer == "text_projection" else "text_model."
        yield from (f"{part}.{layer}", f"{part}.{inside}{layer}")
        yield from (beginning + (inside + layer).replace(".", "_") for beginning in KOHYA[part])
        if part == "unet":
            yield layer


def _bare(shape: tuple[int, ...]) -> list[int]:
    """Without axes of length 1: linear layers and 1x1 convolutions are one."""
    return [n for n in shape if n != 1]


def _family(lora: Lora, *, xl: bool) -> str:
    """Of which model a LoRA is, as far as its layers show."""
    for sign, family in OTHERS[1 if xl else 0 :]:
        if any(re.search(sign, layer) for layer in lora.changes):
            return f", as it is a LoRA of {family}"
    for layer, change in lora.changes.items():
        if re.search(r"attn2[._]to_k$", layer) and (width := change.shape[1]) in CONTEXTS:
            return f" (its UNet attends to features of {width} channels, as that of {CONTEXTS[width].name} may)"
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
