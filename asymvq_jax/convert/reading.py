"""Reads an autoencoder of any kind: described from names and shapes first; then its own tensors alone are read."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.diffusers import KINDS, WEIGHTS, diffusers_to_config
from asymvq_jax.convert.families import family_of
from asymvq_jax.convert.finding import MEAN, Found, find_autoencoder, groups
from asymvq_jax.convert.mapping import Format, Weight, from_torch, weights
from asymvq_jax.convert.scaling import scale_of
from asymvq_jax.convert.sources import describe_folder, in_bucket, locate
from asymvq_jax.errors import CheckpointError, ConfigError, ConvertError, UserError
from asymvq_jax.files.stored import Shaped, Table, fitted, misfits
from asymvq_jax.files.weights import Weights, open_folder, open_weights, read_json
from asymvq_jax.models.autoencoder import Autoencoder, in_dtype, structure
from asymvq_jax.models.checkpoints import find_step, load_model
from asymvq_jax.models.embedded import Known, ignore, is_embedded
from asymvq_jax.models.parameters import Params, merge

log = logging.getLogger(__name__)

# In a folder's file, but no part of the model; anything else there that does not fit is an error.
HARMLESS = ("loss.", "model_ema.", "decoder.up_layers.")
# A constant in the code of FLUX.2, whose files therefore do not say it.
FLUX2_EPSILON = 1e-4


@dataclass(frozen=True)
class Described:
    """An autoencoder in PyTorch's files, complete and of the right shapes, its tensors not read yet."""

    path: Path
    config: ModelConfig
    form: Format
    tensors: Table = field(repr=False)

    def load(self) -> Autoencoder:
        """Reads the tensors.

        Raises:
            UserError: a tensor that is not finite or cannot be read.
        """
        named = weights(self.config, self.form)
        return merge(structure(self.config)[0], fill(named, self.tensors, self.path, ConvertError))


def read_model(
    source: str | Path,
    factors: Mapping[str, float] | None = None,
    *,
    dtype: str | None = None,
    known: Known = ignore,
) -> Autoencoder:
    """Reads a model of any kind that `convert` knows.

    Args:
        source: as for `convert`; a JAX checkpoint may also be in a bucket (gs://).
        factors: `scaling_factor` and `shift_factor`, where the source does not say them.
        dtype: in which it computes; by default as its config says.
        known: called with the configuration before the weights are read, for what can be done meanwhile.

    Raises:
        UserError: the source does not exist, is of no known kind, or is incomplete.
    """
    here = not in_bucket(source) and not is_embedded(source)
    described = describe(source, factors) if here else None
    if is_embedded(source):
        log.info("%s: a small model inside the package, for trying things out; --checkpoint names another", source)
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if described is None:
        model = load_model(locate(source) if here else source, known=known, **changes)
        _check_factors(source, factors or {}, model.config)
    else:
        known(dataclasses.replace(described.config, **changes))
        model = described.load()
    return model if dtype in (None, model.config.dtype) else in_dtype(model, str(dtype))


def given_factors(scaling_factor: float | None, shift_factor: float | None) -> dict[str, float]:
    """The `factors` of `read_model`: those of the two that the user gives.

    Raises:
        ConvertError: a value that cannot be a scale.
    """
    for name, value, good in (
        ("--scaling-factor", scaling_factor, scaling_factor is None or 0 < scaling_factor < math.inf),
        ("--shift-factor", shift_factor, shift_factor is None or math.isfinite(shift_factor)),
    ):
        if not good:
            raise ConvertError(f"{name} {value}: expected a{' positive' if 'scaling' in name else ''} number")
    given = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    return {name: value for name, value in given.items() if value is not None}


def describe(source: str | Path, factors: Mapping[str, float] | None = None) -> Described | None:
    """Looks into a source on this machine, and checks that all is there that its model needs; reads no weights.

    Returns:
        None for a JAX checkpoint, or a model that the package holds.

    Raises:
        UserError: as `read_model`.
    """
    if is_embedded(source):
        return None
    path, factors = locate(source), factors or {}
    if path.is_file():
        beside = path.parent / "config.json"
        if (
            re.match(rf"{WEIGHTS}(\.|-)", path.name)
            and beside.is_file()
            and read_json(beside).get("_class_name") in KINDS
        ):
            log.info("%s: read with the config.json beside it", path)
            # A shard stands for all of them.
            return _describe_folder(path.parent, factors, None if "-of-" in path.name else open_weights(path))
        return describe_weights(open_weights(path), factors)
    for folder in (path, path / "vae", path / "vqvae"):
        if (folder / "config.json").is_file():
            return _describe_folder(folder, factors)
    if (path / "model_index.json").is_file():
        kind = str(read_json(path / "model_index.json").get("_class_name"))
        raise ConvertError(
            f"{path} is a diffusers pipeline ({family_of(kind)}) without an autoencoder in vae/ or vqvae/"
        )
    try:
        find_step(path)
    except CheckpointError as error:
        hints = ["or a diffusers folder (with a config.json), or an original checkpoint"]
        hints += [hint] if path.is_dir() and (hint := describe_folder(path)) else []
        raise ConvertError("; ".join([str(error), *hints])) from None
    log.info("%s: a JAX checkpoint", path)
    return None


def _describe_folder(folder: Path, factors: Mapping[str, float], opened: Weights | None = None) -> Described:
    """A diffusers folder, or one file of it (`opened`)."""
    file = folder / "config.json"
    stored = read_json(file)
    try:
        config = diffusers_to_config(stored, file)
    except ConfigError as error:
        raise ConvertError(f"{file}: {error}") from None
    if factors:
        if stored.get("scaling_factor") is None and not (config.latent_mean or config.batch_norm_epsilon):
            config = _rescaled(config, **factors)
        _check_factors(folder, factors, config)
    opened_all = opened or open_folder(folder, WEIGHTS)
    found = find_autoencoder(opened_all, video=config.encoder_layers != "sd")
    if config.encoder_layers == "sd":
        try:
            read = sizes(found, opened_all, config.norm_groups)
        except ConvertError:
            # What is missing is listed below.
            read = config
        _compare(config, read, file)
    unexpected = {n: x for n, x in found.rest.items() if not n.startswith(HARMLESS)} if opened is None else {}
    log.info("%s: diffusers' %s", folder, stored["_class_name"])
    return _described(config, found, folder, unexpected)


def describe_weights(opened: Weights, factors: Mapping[str, float]) -> Described:
    """The autoencoder of a file that has no configuration beside it, and may be that of a whole diffusion model.

    Args:
        opened: the file.
        factors: `scaling_factor` and `shift_factor`, as far as the user says them.

    Raises:
        ConvertError: it holds no autoencoder, or one that is not supported, or a scale is needed and missing.
    """
    found = find_autoencoder(opened)
    if found.rest:
        log.info(
            "%s: %d tensors do not belong to the autoencoder and are not read: %s",
            opened.path,
            len(found.rest),
            groups(found.rest),
        )
    return describe_found(found, opened, factors)


def describe_found(found: Found, opened: Weights, factors: Mapping[str, float]) -> Described:
    """As `describe_weights`, of what `find_autoencoder` has found in it."""
    config = sizes(found, opened)
    if not config.batch_norm_epsilon:
        scale = scale_of(opened, found.rest, config.latent_channels, bool(config.codebook_size), factors)
        config = _rescaled(config, scaling_factor=scale.scaling, shift_factor=scale.shift)
    elif factors:
        raise ConvertError(
            f"{opened.path}: its latents are normalised by statistics among its weights; leave out "
            f"{' and '.join('--' + name.replace('_', '-') for name in factors)}"
        )
    log.info(
        "%s: an autoencoder under %s names%s",
        opened.path,
        "diffusers'" if found.form == "diffusers" else "the original",
        "" if config.condition else ", without condition branch",
    )
    return _described(config, found, opened.path)


def sizes(found: Found, opened: Weights, norm_groups: int | None = None) -> ModelConfig:
    """Reads the sizes off the tensors of an autoencoder; those of its scale are the default's.

    Args:
        found: the autoencoder.
        opened: its file.
        norm_groups: what no tensor shows; None: as the file's metadata say, or the default's.

    Raises:
        ConvertError: tensors that every autoencoder has are missing, or their sizes are those of no model.
    """
    tensors = found.tensors
    down, up, block, q = (
        ("down_blocks", "up_blocks", "resnets", "to_q") if found.form == "diffusers" else ("down", "up", "block", "q")
    )
    attention = "attentions" if found.form == "diffusers" else "attn"

    def channels(half: str) -> tuple[int, ...]:
        pattern = re.compile(rf"{half}\.(\d+)\.{block}\.0\.conv1\.weight")
        widths = {int(m[1]): v.shape[0] for name, v in tensors.items() if (m := pattern.fullmatch(name))}
        return tuple(widths[level] for level in sorted(widths))

    def blocks(half: str) -> int:
        return sum(bool(re.fullmatch(rf"{half}\.0\.{block}\.\d+\.conv1\.weight", name)) for name in tensors)

    needed = [f"{half}.conv_in.weight" for half in ("encoder", "decoder")]
    needed += [f"{half}.0.{block}.0.conv1.weight" for half in (f"encoder.{down}", f"decoder.{up}")]
    if missing := [name for name in needed if name not in tensors]:
        halves = [half for half in ("encoder", "decoder") if any(name.startswith(f"{half}.") for name in tensors)]
        raise ConvertError(
            f"{opened.path} holds no supported autoencoder: missing {', '.join(missing)}, under the "
            f"original names or diffusers'{f'; only its {halves[0]} is there' if len(halves) == 1 else ''}"
        )
    encoder, decoder = channels(f"encoder.{down}"), channels(f"decoder.{up}")
    middle = "mid_block.attentions.0" if found.form == "diffusers" else "mid.attn_1"
    branch = "decoder.condition_encoder." if found.form == "diffusers" else "decoder.encoder."
    first = tensors.get(f"{branch}layers.0.weight")
    condition_mask = first is not None and first.shape[1] == tensors["encoder.conv_in.weight"].shape[1] + 1
    # ASUKA's code reduces masks in this way, and its decoder is the one that sees them.
    any_masked = opened.metadata.get("mask_area_any", str(int(condition_mask))) == "1"
    said = opened.metadata.get("norm_groups", "")
    groups = norm_groups or (int(said) if said.isdigit() else ModelConfig().norm_groups)
    epsilon, patch = _statistics(found, opened)
    codes = tensors.get("quantize.embedding.weight")
    read: dict[str, Any] = dict(
        image_channels=tensors["encoder.conv_in.weight"].shape[1],
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        scaling_factor=1.0 if epsilon else ModelConfig().scaling_factor,
        latent_patch=patch,
        batch_norm_epsilon=epsilon,
        encoder_channels=encoder,
        decoder_channels=decoder[::-1] if found.form == "diffusers" else decoder,
        encoder_blocks=blocks(f"encoder.{down}"),
        decoder_blocks=blocks(f"decoder.{up}") - 1,
        attention_levels=tuple(
            i for i in range(len(encoder)) if f"encoder.{down}.{i}.{attention}.0.{q}.weight" in tensors
        ),
        mid_attention=f"encoder.{middle}.{q}.weight" in tensors,
        quant_conv="quant_conv.weight" in tensors,
        codebook_size=0 if codes is None else codes.shape[0],
        condition=any(name.startswith(branch) for name in tensors),
        condition_mask=condition_mask,
        mask_reduction="area-any" if any_masked else "nearest",
        norm_groups=groups,
    )
    try:
        return ModelConfig(**read)
    except ConfigError as error:
        raise ConvertError(f"{opened.path}: {error}") from None


def _statistics(found: Found, opened: Weights) -> tuple[float, int]:
    """Epsilon of the statistics that normalise the latent (0 without any), and the side of the patches that they are
    of."""
    mean, latent = found.tensors.get(MEAN), found.tensors["decoder.conv_in.weight"].shape[1]
    if mean is None:
        return 0.0, 1
    patch = math.isqrt(mean.size // latent)
    if patch**2 * latent != mean.size:
        raise ConvertError(f"{opened.path}: {MEAN} has {mean.size} channels; expected a square times {latent}")
    try:
        return float(opened.metadata.get("batch_norm_epsilon", FLUX2_EPSILON)), patch
    except ValueError:
        raise ConvertError(f"{opened.path}: batch_norm_epsilon in its metadata is not a number") from None


# What `sizes` cannot read off the tensors.
_NOT_SIZES = ("scaling_factor", "shift_factor", "latent_mean", "latent_std", "batch_norm_epsilon", "norm_groups")


def _compare(stored: ModelConfig, found: ModelConfig, file: Path) -> None:
    """Raises ConvertError where a config.json says something else than the weights beside it are."""
    differing = [
        f"{field.name} {getattr(stored, field.name)} (the weights have {getattr(found, field.name)})"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _NOT_SIZES and getattr(stored, field.name) != getattr(found, field.name)
    ]
    if differing:
        raise ConvertError(
            f"{file} is of another model than the weights beside it: {', '.join(differing)}; download both again"
        )


def _rescaled(config: ModelConfig, **scale: float) -> ModelConfig:
    changes: dict[str, Any] = dict(scale)
    return dataclasses.replace(config, **changes)


def _check_factors(source: str | Path, factors: Mapping[str, float], config: ModelConfig) -> None:
    """Raises ConvertError where a source has a configuration that says something else than the user."""
    if wrong := [
        f"{n}={getattr(config, n)}, not {value}" for n, value in factors.items() if getattr(config, n) != value
    ]:
        raise ConvertError(
            f"{' and '.join(factors)}: these options are for original checkpoints only; {source} has a configuration "
            f"with {' and '.join(wrong)}"
        )


def _described(
    config: ModelConfig, found: Found, path: Path, unexpected: Mapping[str, Shaped] | None = None
) -> Described:
    expected = {w.name: w.torch_shape for w in weights(config, found.form)}
    tensors = fitted(found.tensors, expected)
    if problems := misfits({**tensors, **(unexpected or {})}, expected):
        raise ConvertError(f"{path}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))
    return Described(path, config, found.form, tensors)


def fill(
    named: Sequence[Weight],
    tensors: Table,
    path: Path | str,
    error: type[UserError],
    dtype: Callable[[str], DTypeLike | None] = lambda name: None,
) -> Params:
    """Reads tensors into a model's parameters, one at a time.

    Args:
        named: the parameters.
        tensors: all of them by their names in PyTorch, of the right shapes.
        path: the file or folder, for messages.
        error: what to raise.
        dtype: what each parameter is kept in, by our name; None: as it is read.

    Raises:
        UserError: of type `error`, where some are not finite.
    """
    params: dict[str, jax.Array] = {}
    broken, blank = [], []
    for weight in named:
        array = from_torch(weight, tensors[weight.name].read())
        if weight.path.endswith("kernel") and not array.any():
            blank.append(weight.name)
        if not np.isfinite(array).all():
            broken.append(f"{weight.name} ({np.count_nonzero(~np.isfinite(array))} of {array.size})")
        params[weight.path] = jnp.asarray(array, dtype(weight.path))
    if broken:
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise error(
            f"{path}: {len(broken)} tensors have NaN or infinity in them, which makes pictures black: "
            f"{', '.join(broken[:8])}{more}; download the file again, or take its float32 version"
        )
    if blank:
        log.warning(
            "%s: %d kernels are zero throughout, such as %s: was the download interrupted?", path, len(blank), blank[0]
        )
    return params
