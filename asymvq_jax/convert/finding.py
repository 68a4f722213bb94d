"""The autoencoder in a file of weights, wherever it is in there and however its layers are spelled."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asymvq_jax.convert.families import name_autoencoder, name_weights
from asymvq_jax.convert.mapping import BATCHES, Format
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.stored import StoredTensor, Table
from asymvq_jax.files.weights import Weights

log = logging.getLogger(__name__)

# Both ends of an autoencoder, whose names are the same in all forms.
ENDS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize", "bn")
# FLUX.2's original has these within its halves.
INNER = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
# FLUX.2's normalisation of the latent.
MEAN = "bn.running_mean"
# In an original checkpoint, but no part of the autoencoder's function.
UNUSED = ("decoder.up_layers.",)
# What an attention's layers are called, by their name in the original and in diffusers.
ATTENTION = {
    ("norm", "group_norm"): ("norm", "group_norm"),
    ("q", "to_q"): ("q", "to_q", "query"),
    ("k", "to_k"): ("k", "to_k", "key"),
    ("v", "to_v"): ("v", "to_v", "value"),
    ("proj_out", "to_out.0"): ("proj_out", "to_out.0", "to_out", "proj_attn"),
}
SPELLINGS = {spelled: names for names, all_of_them in ATTENTION.items() for spelled in all_of_them}


@dataclass(frozen=True)
class Found:
    """An autoencoder's tensors under the names of one form, and what else is beside them."""

    form: Format
    tensors: Table
    rest: Table


def find_autoencoder(weights: Weights, *, video: bool = False) -> Found:
    """Finds the one autoencoder that a file or folder holds, alone or as a part of something larger.

    Args:
        weights: the file or folder.
        video: a configuration beside it says that it is a video model's, of a kind that is supported.

    Raises:
        ConvertError: it holds no autoencoder, or one that is not supported; the message says what it holds.
    """
    # One that lacks an end is found by the other, so that what it lacks can be named.
    tries = (find_prefix(weights, ends, ("first_stage_model.", "vae.")) for ends in (ENDS, ENDS[:1], ENDS[1:]))
    prefix = next((found for found in tries if found is not None), None)
    if prefix is None:
        what = name_weights(weights.tensors) or f"missing {', '.join(ENDS)}, ..."
        raise ConvertError(f"{weights.path} holds no autoencoder: {what}")
    tensors: Table = {}
    rest: Table = {}
    inside = {n.removeprefix(prefix) for n in weights.tensors if n.startswith(prefix)}
    form: Format = "diffusers" if any(n.startswith("encoder.down_blocks.") for n in inside) else "ldm"
    for name, tensor in weights.tensors.items():
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and bare.split(".")[0] in PARTS and not bare.startswith(UNUSED):
            tensors[_spelled(bare, form)] = tensor
        else:
            rest[name] = tensor
    if MEAN in tensors:
        # Some programs leave out how many batches there were, on which nothing depends.
        tensors.setdefault(BATCHES, StoredTensor((), "int64", lambda: np.zeros((), np.int64)))
    if not video and (other := name_autoencoder(tensors)):
        raise ConvertError(f"{weights.path} {other}")
    return Found(form, tensors, rest)


def find_prefix(weights: Weights, ends: Sequence[str], known: tuple[str, ...]) -> str | None:
    """What the names of a part begin with; None if the part is missing.

    Args:
        weights: the file.
        ends: names that the part has, without what they begin with.
        known: how the beginning ends in published files, which goes before others.

    Raises:
        ConvertError: there are several such parts.
    """
    first, *others = ends
    starts = [n.removesuffix(first) for n in weights.tensors if n.endswith(first)]
    starts = [s for s in starts if all(s + end in weights.tensors for end in others) and (not s or s.endswith("."))]
    # Averages are beside the weights in a training's checkpoint.
    plain = [s for s in starts if not re.search(r"(^|[._])ema", s)]
    if averages := [f"{s}*" for s in starts if s not in plain and plain]:
        log.info("%s: also holds averages of the weights, which are not used: %s", weights.path, *averages)
    chosen = plain or starts
    chosen = ([s for s in chosen if s.endswith(known)] if len(chosen) > 1 else []) or chosen
    if len(chosen) > 1:
        raise ConvertError(
            f"{weights.path} holds {len(chosen)} models of one kind, {', '.join(f'{s}*' for s in chosen)}: "
            "save the one to read in a file of its own"
        )
    return chosen[0] if chosen else None


def _spelled(name: str, form: Format) -> str:
    """The name as the mapping table has it."""
    for beginning, ours in INNER.items():
        name = ours + name.removeprefix(beginning) if name.startswith(beginning) else name
    match = re.fullmatch(r"(.*\.(?:attn_1|attn\.\d+|attentions\.\d+)\.)(.+)(\.(?:weight|bias))", name)
    if match and match[2] in SPELLINGS:
        return match[1] + SPELLINGS[match[2]][form == "diffusers"] + match[3]
    theirs, original = ".conv_shortcut.", ".nin_shortcut."
    return name.replace(original, theirs) if form == "diffusers" else name.replace(theirs, original)


def groups(names: Iterable[str]) -> str:
    """Names by what they begin with: "model.diffusion_model.* (686), loss.* (30)"."""
    counts = Counter(_group(name) for name in names)
    shown = [f"{group} ({count})" if count > 1 else group for group, count in counts.most_common(6)]
    return ", ".join(shown) + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")


def _group(name: str) -> str:
    parts = name.split(".")
    depth = 2 if parts[0] in ("model", "state_dict") else 1
    return name if len(parts) <= depth else ".".join(parts[:depth]) + ".*"
