"""How a diffusion model scales an autoencoder's latents: from the file, or from the user, and never a silent guess."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.stored import DTYPES, Table
from asymvq_jax.files.weights import Weights

log = logging.getLogger(__name__)


class Scale(NamedTuple):
    """A diffusion model sees (latent - shift) * scaling; `reason` is where that is from."""

    scaling: float
    shift: float
    reason: str


class Family(NamedTuple):
    """A published diffusion model's latents."""

    name: str
    channels: int
    scaling: float
    shift: float = 0.0


ONE = Family("Stable Diffusion 1 and 2", 4, 0.18215)
XL = Family("Stable Diffusion XL", 4, 0.13025)
THREE = Family("Stable Diffusion 3", 16, 1.5305, 0.0609)
FLUX = Family("FLUX.1", 16, 0.3611, 0.1159)
# Beginnings of `modelspec.architecture`, which Stability's and kohya's tools write into safetensors' metadata.
ARCHITECTURES = (
    ("stable-diffusion-xl", XL),
    ("stable-diffusion-v3", THREE),
    ("stable-diffusion-3", THREE),
    ("stable-diffusion-v1", ONE),
    ("stable-diffusion-v2", ONE),
    ("flux-1", FLUX),
    ("flux.1", FLUX),
)
# The widths of what the UNets attend to.
CONTEXTS = {768: ONE, 1024: ONE, 2048: XL, 1280: XL}


def scale_of(weights: Weights, rest: Table, channels: int, codebook: bool, factors: Mapping[str, float]) -> Scale:
    """The scale of an autoencoder that has no configuration beside it.

    Args:
        weights: the file.
        rest: its tensors that do not belong to the autoencoder.
        channels: of the latent.
        codebook: whether it is a VQ model.
        factors: `scaling_factor` and `shift_factor`, as far as the user says them; they win.

    Raises:
        ConvertError: neither the file nor the user gives it, and no published model's scale is a safe guess.
    """
    found = _stored(weights, rest) or _by_family(weights, rest, channels)
    if {"scaling_factor", "shift_factor"} <= factors.keys():
        return _given(weights.path, factors, found)
    if found is not None:
        return _given(weights.path, factors, found) if factors else _say(weights.path, found)
    if codebook:
        # Latent Diffusion leaves the latents of its VQ models as they are.
        found = Scale(1.0, 0.0, "VQ models' latents are not scaled")
        return _given(weights.path, factors, found) if factors else _say(weights.path, found)
    if channels != ONE.channels:
        published = "; ".join(f"{f.name}: {f.scaling} and {f.shift}" for f in (THREE, FLUX) if f.channels == channels)
        missing = [n for n in ("scaling_factor", "shift_factor") if n not in factors]
        raise ConvertError(
            f"{weights.path}: the file does not say how a diffusion model scales its latents of {channels} "
            f"channels; give {' and '.join('--' + n.replace('_', '-') for n in missing)}"
            + (f" ({published})" if published else " (1 and 0 for no scaling)")
        )
    if "scaling_factor" not in factors and re.search(r"xl", weights.path.name, re.IGNORECASE):
        raise ConvertError(
            f"{weights.path}: the file's name mentions Stable Diffusion XL, and the file does not say how latents are "
            f"scaled; give --scaling-factor {XL.scaling} if it is XL's, {ONE.scaling} if it is 1's or 2's"
        )
    default = Scale(ONE.scaling, ONE.shift, "")
    if "scaling_factor" in factors:
        return _given(weights.path, factors, default)
    log.warning(
        "%s: the file does not say how latents are scaled: using %s's scaling factor, %s, as they have %d channels; "
        "for a Stable Diffusion XL autoencoder, which has as many, give --scaling-factor %s",
        weights.path, ONE.name, ONE.scaling, channels, XL.scaling,
    )  # fmt: skip
    return _given(weights.path, factors, default)


def _stored(weights: Weights, rest: Table) -> Scale | None:
    """What the file says in numbers: its metadata, as we write them, or Latent Diffusion's own tensor."""
    numbers = {n: _number(weights, n) for n in ("scaling_factor", "shift_factor") if n in weights.metadata}
    if "scaling_factor" in numbers:
        return Scale(numbers["scaling_factor"], numbers.get("shift_factor", 0.0), "the file's metadata")
    for name, tensor in rest.items():
        if name.split(".")[-1] == "scale_factor" and tensor.size == 1:
            value = _decimal(float(tensor.read().reshape(())), tensor.dtype)
            if not (math.isfinite(value) and value > 0):
                raise ConvertError(
                    f"{weights.path}: its scale_factor is {value}; expected a positive number: give --scaling-factor"
                )
            return Scale(value, 0.0, f"the file's tensor {name}")
    return None


def _decimal(value: float, dtype: str) -> float:
    """The decimal number that a stored one was rounded from."""
    kind = DTYPES[dtype]
    published = [family.scaling for family in (ONE, XL, THREE, FLUX)]
    likely = [*published, *(round(value, digits) for digits in range(3, 8))]
    return next((each for each in likely if float(np.asarray(each, kind)) == value), value)


def _number(weights: Weights, name: str) -> float:
    try:
        value = float(weights.metadata[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConvertError(f"{weights.path}: {name} is {weights.metadata[name]!r} in its metadata; expected a number")
    return value


def _by_family(weights: Weights, rest: Table, channels: int) -> Scale | None:
    """The published scale of the diffusion model that is in the same file, or that the metadata name."""
    stated = weights.metadata.get("modelspec.architecture", "").lower()
    evidence = [
        (family, f"modelspec.architecture={stated}") for begin, family in ARCHITECTURES if stated.startswith(begin)
    ]
    for name, tensor in rest.items():
        if ".joint_blocks." in name:
            evidence.append((THREE, name))
        elif ".double_blocks." in name:
            evidence.append((FLUX, name))
        elif re.search(r"(^|\.)(label_emb|add_embedding)\.", name):
            evidence.append((XL, name))
        elif name.endswith(".attn2.to_k.weight") and tensor.ndim == 2 and tensor.shape[1] in CONTEXTS:
            evidence.append((CONTEXTS[tensor.shape[1]], f"{name}, which takes features of {tensor.shape[1]} channels"))
    # XL's UNet has layers of 1's widths too.
    evidence.sort(key=lambda found: found[0] is ONE)
    for family, sign in evidence:
        if family.channels == channels:
            return Scale(family.scaling, family.shift, f"{family.name}'s, by {sign}")
    return None


def _say(path: Path, scale: Scale) -> Scale:
    log.info("%s: scaling factor %s, shift %s: %s", path, scale.scaling, scale.shift, scale.reason)
    return scale


def _given(path: Path, factors: Mapping[str, float], found: Scale | None) -> Scale:
    default = found or Scale(ModelConfig().scaling_factor, 0.0, "")
    scale = Scale(
        factors.get("scaling_factor", default.scaling), factors.get("shift_factor", default.shift), "as given"
    )
    if found and found.reason and found[:2] != scale[:2]:
        log.warning(
            "%s: using scaling factor %s and shift %s as given; the file has %s and %s (%s)",
            path, *scale[:2], *found,
        )  # fmt: skip
    return scale
