"""An original Stable Diffusion checkpoint, all parts in one file: where each is, and its sizes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asymvq_jax.convert.finding import find_autoencoder, find_prefix, groups
from asymvq_jax.convert.reading import Described, describe_found
from asymvq_jax.diffusion.clip import TextConfig, TransformerConfig
from asymvq_jax.diffusion.mapping import split_joint
from asymvq_jax.diffusion.unet import UNetConfig
from asymvq_jax.errors import PipelineError
from asymvq_jax.files.stored import Table
from asymvq_jax.files.weights import Weights

log = logging.getLogger(__name__)

UNET_ENDS = ("input_blocks.0.0.weight", "out.2.weight")
# Of a text encoder with transformers' names, and with OpenCLIP's; and what each has of use.
TRANSFORMERS_ENDS, OPEN_CLIP_ENDS = (
    ("embeddings.token_embedding.weight",),
    ("token_embedding.weight", "ln_final.weight"),
)
TRANSFORMERS_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
OPEN_CLIP_PARTS = ("token_embedding.", "positional_embedding", "transformer.resblocks.", "ln_final.")
# Other families, by a part of a name that theirs have and Stable Diffusion 1 and 2 have not.
FAMILIES = (
    (".joint_blocks.", "Stable Diffusion 3"),
    (".double_blocks.", "FLUX or a transformer of its kind"),
    ("label_emb.0.0.weight", "Stable Diffusion XL"),
    ("conditioner.embedders.1.", "Stable Diffusion XL"),
    (".time_stack.", "Stable Video Diffusion"),
)
# The widths of what Stable Diffusion 1 and 2 attend to.
CONTEXT_ONE, CONTEXT_TWO = 768, 1024
# Blocks of Stable Diffusion 2's text encoder as published, of which the last is never used.
BLOCKS_TWO = 24


@dataclass(frozen=True)
class Original:
    """The parts of a checkpoint, described but not read; names are without the file's prefixes."""

    path: Path
    unet: UNetConfig
    text: TextConfig
    autoencoder: Described
    # Stable Diffusion 2, and not 1.
    two: bool
    # "epsilon" or "v_prediction" where the file says so.
    prediction: str | None
    # The text encoder's names are OpenCLIP's, and not transformers'.
    open_clip: bool
    unet_tensors: Table = field(repr=False)
    text_tensors: Table = field(repr=False)


def find_parts(opened: Weights, factors: Mapping[str, float]) -> Original:
    """Finds the UNet, the text encoder and the autoencoder of a checkpoint.

    Args:
        opened: the file.
        factors: `scaling_factor` and `shift_factor` of the latents, where the user says them.

    Raises:
        UserError: a part is missing, or the checkpoint is another model's; the message says which.
    """
    path = opened.path
    for sign, family in FAMILIES:
        if any(sign in name for name in opened.tensors):
            raise PipelineError(f"{path} is {family}; only Stable Diffusion 1 and 2 are supported")
    unet = _part(opened, UNET_ENDS, ("model.diffusion_model.",))
    text = _part(opened, TRANSFORMERS_ENDS, ("cond_stage_model.transformer.text_model.",), TRANSFORMERS_PARTS)
    open_clip = not text
    text = text or _part(opened, OPEN_CLIP_ENDS, ("cond_stage_model.model.",), OPEN_CLIP_PARTS)
    missing = [f"{name} ({ends[0]}, ...)" for name, ends, part in
               (("UNet", UNET_ENDS, unet), ("text encoder", TRANSFORMERS_ENDS, text)) if not part]  # fmt: skip
    if missing:
        raise PipelineError(
            f"{path} is not an original Stable Diffusion checkpoint: missing its {' and its '.join(missing)}; "
            f"there is {groups(opened.tensors)}"
        )
    found = find_autoencoder(opened)
    used = {id(tensor) for part in (unet, text, found.tensors) for tensor in part.values()}
    if rest := [name for name, tensor in opened.tensors.items() if id(tensor) not in used]:
        log.info("%s: %d tensors are not needed and are not read: %s", path, len(rest), groups(rest))
    config, two = _unet_sizes(unet, open_clip, path)
    projected = any(n.endswith((".text_projection", ".text_projection.weight", ".logit_scale")) for n in opened.tensors)
    text = split_joint(text) if open_clip else text
    return Original(
        path=path,
        unet=config,
        text=_text_sizes(text, path, two=two, open_clip=open_clip, projected=projected),
        autoencoder=describe_found(found, opened, factors),
        two=two,
        prediction=_prediction(opened),
        open_clip=open_clip,
        unet_tensors=unet,
        text_tensors=text,
    )


def _part(opened: Weights, ends: Sequence[str], known: tuple[str, ...], kept: tuple[str, ...] = ("",)) -> Table:
    """The tensors of one part, by their names in it; empty if the part is missing."""
    prefix = find_prefix(opened, ends, known)
    if prefix is None:
        return {}
    inside = {n.removeprefix(prefix): x for n, x in opened.tensors.items() if n.startswith(prefix)}
    # Old files have the positions' numbers as a tensor.
    return {n: x for n, x in inside.items() if n.startswith(kept) and not n.endswith("position_ids")}


def _prediction(opened: Weights) -> str | None:
    """What the UNet predicts, where a marker or the metadata say it."""
    stated = opened.metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in opened.tensors or stated.startswith("v"):
        return "v_prediction"
    return "epsilon" if stated.startswith("eps") else None


def _unet_sizes(tensors: Table, open_clip: bool, path: Path) -> tuple[UNetConfig, bool]:
    """The sizes of an original checkpoint's UNet, and whether it is Stable Diffusion 2's."""
    halvings = sorted(int(m[1]) for n in tensors if (m := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", n)))
    key = next((n for n in tensors if n.endswith("attn2.to_k.weight")), None)
    if not halvings or key is None or "middle_block.1.proj_in.weight" not in tensors:
        raise PipelineError(f"{path}: the UNet is not Stable Diffusion's: no downsampling or no cross-attention")
    per_level, levels = halvings[0], len(halvings) + 1
    firsts = [1 + i * per_level for i in range(levels)]
    widths = [f"input_blocks.{n}.0.out_layers.3.weight" for n in firsts]
    if absent := [name for name in widths if name not in tensors]:
        raise PipelineError(f"{path}: the UNet is not Stable Diffusion's: missing {', '.join(absent)}")
    channels, context = tuple(tensors[name].shape[0] for name in widths), tensors[key].shape[-1]
    # Published ones are told apart by the width of what they attend to. 2's projections are linear layers, but 1's are
    # written as such by some programs.
    linear = tensors["middle_block.1.proj_in.weight"].ndim == 2
    two = {CONTEXT_ONE: False, CONTEXT_TWO: True}.get(context, linear or open_clip)
    config = UNetConfig(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        blocks=per_level - 1,
        attention=tuple(f"input_blocks.{n}.1.norm.weight" in tensors for n in firsts),
        # 1 has eight heads everywhere, 2 heads of 64 channels.
        heads=tuple(max(1, c // 64) for c in channels) if two else (8,) * levels,
        context=context,
    )
    return config, two


def _text_sizes(tensors: Table, path: Path, *, two: bool, open_clip: bool, projected: bool) -> TextConfig:
    """The sizes of an original checkpoint's text encoder.

    Args:
        tensors: by their names in it.
        path: the file, for messages.
        two: Stable Diffusion 2's, whose activation is another one than 1's.
        open_clip: the names are OpenCLIP's.
        projected: the file has CLIP's projection as well, as those that Stability published.
    """
    block = r"transformer\.resblocks\.(\d+)\." if open_clip else r"encoder\.layers\.(\d+)\."
    blocks = len({int(m[1]) for n in tensors if (m := re.match(block, n))})
    tokens = tensors.get(OPEN_CLIP_ENDS[0] if open_clip else TRANSFORMERS_ENDS[0])
    positions = tensors.get("positional_embedding" if open_clip else "embeddings.position_embedding.weight")
    inner = tensors.get(("transformer.resblocks.0.mlp.c_fc" if open_clip else "encoder.layers.0.mlp.fc1") + ".bias")
    if not blocks or tokens is None or positions is None or inner is None:
        raise PipelineError(f"{path}: its text encoder is not CLIP's or OpenCLIP's")
    # 2 takes the result of the last block but one. Stability's files have 24 blocks, of which the last is never used;
    # those that diffusers' scripts write have the 23 that are.
    unused = two and (blocks == BLOCKS_TWO or (open_clip and projected and blocks != BLOCKS_TWO - 1))
    if two:
        log.info(
            "%s: of the %d blocks of Stable Diffusion 2's text encoder %s", path, blocks,
            "the last is not used, as published" if unused else "all are used: the last of 24 has been left out",
        )  # fmt: skip
    transformer = TransformerConfig(
        channels=tokens.shape[1],
        inner=inner.size,
        layers=blocks - unused,
        heads=max(1, tokens.shape[1] // 64),
        activation="gelu" if two else "quick_gelu",
        epsilon=1e-5,
    )
    return TextConfig(transformer, vocabulary=tokens.shape[0], length=positions.shape[-2])


def without_unused(original: Original) -> Table:
    """The text encoder's tensors without those of a block that is not used."""
    last = original.text.transformer.layers
    unused = f"transformer.resblocks.{last}." if original.open_clip else f"encoder.layers.{last}."
    return {name: tensor for name, tensor in original.text_tensors.items() if not name.startswith(unused)}
