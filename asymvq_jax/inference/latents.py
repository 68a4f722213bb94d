"""A latent's layout and scale: given by the user, or found by comparing it with the picture's own; and both scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.inference.packed import describe_tokens, looks_packed, unpack, without_frames
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.latent import Normalization, normalization

Array = npt.NDArray[np.floating]
Layout = Literal["channels-first", "channels-last"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

# From this correlation with the picture's own latent on, outside the mask, the scale is certain.
CERTAIN = 0.9
# Below this one the latent is probably of another picture.
FOREIGN = 0.3
# A layout is found from this correlation on, if that of the other is less by so much.
ALIKE, DISTINCT = 0.5, 0.2
# Scaled latents spread by about 1. A latent that does within this factor, as it is or once it is scaled, and not nearly
# so well the other way, is known.
SPREAD = 2.0
# Fewer of the latent's pixels outside the mask say nothing.
ENOUGH = 12
# Why a latent in tokens counts as scaled.
PACKED = "packed, as diffusion models have them"


@dataclass(frozen=True)
class Reading:
    """A latent as `decode` takes it, and how it was understood.

    Attributes:
        latent: (1, h, w, c) float32, not scaled.
        layout: which axis was taken for the channels.
        scaled: whether it was taken as times the scaling factor.
        reason: why, for a message.
        warning: what does not fit, or "".
    """

    latent: jax.Array
    layout: Layout
    scaled: bool
    reason: str
    warning: str = ""

    def describe(self) -> str:
        """Such as "latent: channels first, scaled (as the picture's own latent outside the mask)"."""
        scale = "scaled" if self.scaled else "unscaled"
        return f"latent: {self.layout.replace('-', ' ')}, {scale} ({self.reason})"


def normalize_latent(model: Autoencoder, latent: jax.Array | Array) -> jax.Array:
    """A latent as the model's diffusion model sees it.

    Args:
        model: the autoencoder.
        latent: (b, h, w, c), as `encode` gives it.

    Returns:
        (b, h / p, w / p, c * p**2), p being `model.config.latent_patch` (1 but for FLUX.2): scaled and shifted, or
        normalised by channel, as the model's configuration and weights say.

    Raises:
        InputError: h or w is not a multiple of p, or c is another number than the model's.
    """
    return model.normalization().apply(_checked(latent, model.config.latent_channels))


def denormalize_latent(model: Autoencoder, latent: jax.Array | Array) -> jax.Array:
    """The inverse of `normalize_latent`: a diffusion model's latent as `decode` takes it.

    Args:
        model: the autoencoder.
        latent: (b, h / p, w / p, c * p**2), as `normalize_latent` gives it.

    Returns:
        (b, h, w, c).

    Raises:
        InputError: it has another number of channels.
    """
    return model.normalization().remove(_checked(latent, model.config.latent_channels * model.config.latent_patch**2))


def _checked(latent: jax.Array | Array, channels: int) -> jax.Array:
    if latent.ndim != 4 or latent.shape[-1] != channels:
        raise InputError(f"the latent has shape {latent.shape}: expected (batch, height, width, {channels})")
    return jnp.asarray(latent)


def shapes(config: ModelConfig, size: tuple[int, int], *, patch: int = 1) -> dict[Layout, tuple[int, int, int]]:
    """The shapes that a latent of a picture of this height and width can have; or in patches of so many pixels."""
    height, width = (-(-side // (config.downsampling * patch)) for side in size)
    channels = config.latent_channels * patch**2
    return {"channels-first": (channels, height, width), "channels-last": (height, width, channels)}


def check_latent(
    array: Array, config: ModelConfig, size: tuple[int, int], layout: Layout | None = None
) -> list[Layout]:
    """The layouts in which a latent fits a picture, from its shape; see `understand`.

    Raises:
        InputError: it fits in no layout (the message gives both shapes), or does not hold finite real numbers.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"the latent's layout {layout!r}: expected {' or '.join(LAYOUTS)}")
    array = without_frames(np.asarray(array), config)
    if (latent := unpack(array, config, size)) is not None:
        array, layout = latent, "channels-last"
    # A diffusion model's, in patches, has a shape of its own.
    known = [pair for p in sorted({1, config.latent_patch}) for pair in shapes(config, size, patch=p).items()]
    inner = array.shape[1:] if array.ndim == 4 and array.shape[0] == 1 else array.shape
    fitting = [name for name, shape in known if inner == shape and layout in (None, name)]
    if not fitting and array.ndim == 4 and array.shape[0] > 1:
        raise InputError(
            f"the latent has shape {array.shape}, a batch of {array.shape[0]}: expected one; save each latent alone, "
            "or decode all of them by asymvq decode"
        )
    if not fitting:
        wanted = [str(shape) for name, shape in known if layout in (None, name)]
        raise InputError(
            f"the latent has shape {array.shape}: expected {' or '.join(wanted)}, "
            f"with or without a leading 1, for a picture of {size[1]} x {size[0]} px"
            f"{describe_tokens(array, config, size)}"
        )
    if array.dtype.kind not in "fiu":
        raise InputError(f"the latent holds values of type {array.dtype}: expected real numbers")
    if not np.isfinite(array).all():
        raise InputError("the latent holds values that are not finite (NaN or infinity)")
    return fitting


def understand(
    array: Array,
    config: ModelConfig,
    size: tuple[int, int],
    *,
    own: Callable[[], jax.Array | Array] | None = None,
    mask: Array | None = None,
    layout: Layout | None = None,
    scaled: bool | None = None,
    norm: Normalization | None = None,
) -> Reading:
    """Brings an edited latent into the form that `decode` takes.

    What the user does not give is found where it is certain: outside the mask, an edited latent is close to the
    picture's own, but for the scaling factor.

    Args:
        array: (c, h, w) or (h, w, c), or either with a leading 1, as PyTorch or JAX pipelines return latents; or with
            an axis of one frame; or in tokens (see `unpack`).
        config: the model's.
        size: height and width of the picture.
        own: gives the picture's own latent, (1, h, w, c), not scaled; only called where something is to be found.
        mask: (h, w, 1), 1 = generate.
        layout: the array's; None: found.
        scaled: whether it is as diffusion models have it (see `normalize_latent`); None: found, or scaled.
        norm: the model's `normalization()`; needed where that is among its weights.

    Raises:
        InputError: it does not fit the picture, or not as `scaled` says; or it fits in two layouts, with nothing to
            compare it with, or alike in both; or `norm` is needed.
    """
    fitting = check_latent(array, config, size, layout)
    inner = without_frames(np.asarray(array), config)
    default = "by default"
    if (tokens := unpack(inner, config, size)) is not None:
        inner, layout, default = tokens, "channels-last", PACKED
    inner = (inner[0] if inner.ndim == 4 else inner).astype(np.float32)
    norm = norm or normalization(config)
    if config.latent_patch > 1:
        return _in_patches(inner, config, size, norm, own, layout, scaled)
    ways = {name: inner.transpose(1, 2, 0) if name == "channels-first" else inner for name in fitting}
    given = scaled is not None
    fits: dict[Layout, tuple[float, bool]] = {}
    if own is not None and (len(fitting) > 1 or not given):
        kept = _kept(mask, shapes(config, size)["channels-last"][:2], config.downsampling)
        if kept.sum() >= ENOUGH:
            z = np.asarray(own())
            seen = np.asarray(norm.apply(jnp.asarray(z)))[0][kept]
            fits = {name: _compare(way[kept], z[0][kept], seen) for name, way in ways.items()}
    best = max(fits, key=lambda name: fits[name][0]) if fits else fitting[0]
    correlation, as_seen = fits.get(best, (0.0, True))
    reason, warning = "as given" if given else default, ""
    if len(fitting) > 1:
        both = f"the latent's shape {np.shape(array)} fits with the channels first and last"
        option = f"--latent-layout {' or '.join(LAYOUTS)}"
        others = [fits[name][0] for name in fits if name != best]
        if not fits or (correlation >= ALIKE and correlation - max(others) < DISTINCT):
            raise InputError(f"{both}, and its values do not show which: give {option}")
        if correlation < ALIKE:
            best = "channels-first"
            warning = (
                f"{both}, and in neither is it like the picture's own latent outside the mask: read with the channels "
                f"first, as PyTorch's pipelines write latents; to choose, give {option}"
            )
    if scaled is None:
        scaled = True
        if correlation >= CERTAIN:
            scaled = as_seen
            reason = "as the picture's own latent outside the mask"
    if fits and correlation < FOREIGN and not warning:
        warning = "outside the mask the latent is not like the picture's own: is it of another picture or autoencoder?"
    latent = jnp.asarray(ways[best][None])
    return Reading(norm.remove(latent) if scaled else latent, best, bool(scaled), reason, warning)


def _in_patches(
    inner: Array,
    config: ModelConfig,
    size: tuple[int, int],
    norm: Normalization,
    own: Callable[[], jax.Array | Array] | None,
    layout: Layout | None,
    scaled: bool | None,
) -> Reading:
    """As `understand`, where a diffusion model sees patches: the shape of (c, h, w) or (h, w, c) shows the scale."""
    rows, columns = shapes(config, size)["channels-last"][:2]
    found: dict[tuple[Layout, bool], jax.Array] = {}
    for seen in (True, False):
        for name, shape in shapes(config, size, patch=config.latent_patch if seen else 1).items():
            if inner.shape == shape and layout in (None, name) and scaled in (None, seen):
                latent = jnp.asarray((inner.transpose(1, 2, 0) if name == "channels-first" else inner)[None])
                # Patches may reach beyond the picture.
                found[name, seen] = norm.remove(latent)[:, :rows, :columns] if seen else latent
    likeness = dict.fromkeys(found, 0.0)
    if len(found) > 1 and own is not None:
        z = np.asarray(own()).reshape(rows * columns, -1)
        likeness = {key: _fit(np.asarray(x).reshape(z.shape), z)[0] for key, x in found.items()}
    if not found or (len(found) > 1 and sorted(likeness.values())[-1] - sorted(likeness.values())[-2] < DISTINCT):
        kind = {None: "a", True: "a scaled", False: "an unscaled"}[scaled]
        problem = "fits in several ways" if found else f"is not that of {kind} latent of this model"
        raise InputError(f"the latent's shape {inner.shape} {problem}: give its layout and whether it is scaled")
    name, seen = max(found, key=lambda key: likeness[key])
    return Reading(found[name, seen], name, seen, "as given" if scaled is not None else "by its shape")


def count_latents(
    array: Array, config: ModelConfig, *, size: tuple[int, int] | None = None, layout: Layout | None = None
) -> int:
    """How many latents an array holds; arguments and errors are those of `understand_alone`."""
    array, _ = _laid_out(array, config, size, layout)
    return len(array) if array.ndim == 4 else 1


def _laid_out(
    array: Array, config: ModelConfig, size: tuple[int, int] | None, layout: Layout | None
) -> tuple[Array, bool]:
    """The array without an axis of frames, and with the channels last if it is of tokens; whether it is."""
    array = without_frames(np.asarray(array), config)
    if size is not None:
        tokens = unpack(array, config, size)
        return (array, False) if tokens is None else (tokens, True)
    if layout is None and looks_packed(array, config):
        raise InputError(
            f"the latent has shape {array.shape}, which is that of tokens, as FLUX and Qwen-Image pack them: give the "
            "pictures' size by --size HEIGHTxWIDTH, or if it is not packed, --latent-layout " + " or ".join(LAYOUTS)
        )
    return array, False


def understand_alone(
    array: Array,
    config: ModelConfig,
    *,
    size: tuple[int, int] | None = None,
    layout: Layout | None = None,
    scaled: bool | None = None,
    norm: Normalization | None = None,
) -> Reading:
    """Brings latents that no picture belongs to into the form that `decode` takes.

    Args:
        array: (b, c, h, w) or (b, h, w, c), or either without b; or with an axis of one frame; or in tokens (see
            `unpack`).
        config: the model's.
        size: height and width of the pictures, which tokens do not show.
        layout: the array's; None: found by its shape.
        scaled: see `understand`; None: found by the shape, where a diffusion model sees patches, or else by the values'
            spread, for which the scaling factor is there.
        norm: see `understand`.

    Returns:
        The reading; its latent is (b, h, w, c).

    Raises:
        InputError: the array is not of this model or size, or its layout or its scale cannot be found.
    """
    array, packed = _laid_out(array, config, size, layout)
    layout, channels = "channels-last" if packed else layout, config.latent_channels
    if array.dtype.kind not in "fiu" or array.ndim not in (3, 4) or array.size == 0:
        raise InputError(
            f"the latent has shape {array.shape} and type {array.dtype}: expected real numbers, "
            f"(b, {channels}, h, w) or (b, h, w, {channels}), or either without b"
        )
    if not np.isfinite(array).all():
        raise InputError("the latent holds values that are not finite (NaN or infinity)")
    norm = norm or normalization(config)
    batch = (array if array.ndim == 4 else array[None]).astype(np.float32)
    axes: dict[Layout, int] = {"channels-first": 1, "channels-last": 3}
    # Whether a latent of so many channels is scaled; without patches the number does not show it.
    seen = {channels: None} if norm.patch == 1 else {channels * norm.patch**2: True, channels: False}
    fitting = [
        (name, known)
        for name, axis in axes.items()
        for count, known in seen.items()
        if batch.shape[axis] == count and layout in (None, name) and (known is None or scaled in (None, known))
    ]
    if not fitting:
        where = "" if layout is None else f" with the {layout.replace('-', ' ')}"
        counts = " or ".join(map(str, seen))
        raise InputError(
            f"the latent has shape {array.shape}: expected {counts} channels{where}, as the model has"
            f"{'' if size is None else describe_tokens(array, config, size)}"
        )
    if len(fitting) > 1:
        raise InputError(
            f"the latent's shape {array.shape} fits with the channels first and last: give --latent-layout "
            + " or ".join(LAYOUTS)
        )
    name, known = fitting[0]
    latent = jnp.asarray(batch.transpose(0, 2, 3, 1) if name == "channels-first" else batch)
    grids = [shapes(config, size, patch=p)["channels-last"] for p in (1, norm.patch)] if size is not None else []
    if size is not None and latent.shape[1:] not in grids:
        raise InputError(
            f"the latent has shape {array.shape}, with the channels last {latent.shape[1:]}: expected "
            f"{' or '.join(map(str, dict.fromkeys(grids)))} for a picture of {size[1]} x {size[0]} px"
        )
    reason = "as given" if known is None else "by its shape"
    if packed and scaled is None:
        known, reason = True, PACKED
    elif known is None and scaled is None:
        known, reason = _scale_by_spread(latent, norm)
    scaled = scaled if known is None else known
    return Reading(norm.remove(latent) if scaled else latent, name, bool(scaled), reason)


def _scale_by_spread(latent: jax.Array, norm: Normalization) -> tuple[bool, str]:
    """Whether (b, h, w, c) is scaled, and why; raises InputError where its spread does not show it."""
    seen = norm.apply(latent)
    if jnp.all(jnp.asarray(norm.scale) == 1) and jnp.all(jnp.asarray(norm.mean) == 0):
        return True, "the model does not scale its latents"
    spread, unscaled = (_spread(x) for x in (latent, seen))
    near, far = sorted((_apart(spread, 1.0), _apart(unscaled, 1.0)))
    best = _apart(spread, 1.0) == near
    if near > SPREAD or far < 1.5 * near:
        raise InputError(
            f"the latent's values have a standard deviation of {spread:.2f}, and of {unscaled:.2f} once scaled, where "
            "that of scaled latents is about 1, which does not show what they are: give --latent-scaled yes or no"
        )
    return best, f"a standard deviation of {spread if best else unscaled:.2f}{'' if best else ' once scaled'}"


def _spread(latent: jax.Array) -> float:
    """The standard deviation about each channel's mean in each picture."""
    return float(jnp.sqrt(jnp.square(latent - latent.mean((1, 2), keepdims=True)).mean()))


def _apart(value: float, other: float) -> float:
    """The ratio of two numbers, 1 or more."""
    return max(value / other, other / value) if value > 0 else float("inf")


def _kept(mask: Array | None, shape: tuple[int, int], factor: int) -> npt.NDArray[np.bool_]:
    """Where a latent's pixel stands for preserved ones only."""
    if mask is None:
        return np.ones(shape, bool)
    height, width = shape
    padded = np.pad(mask[..., 0], ((0, height * factor - mask.shape[0]), (0, width * factor - mask.shape[1])), "edge")
    kept: npt.NDArray[np.bool_] = padded.reshape(height, factor, width, factor).max((1, 3)) < 0.01
    return kept


def _compare(values: Array, own: Array, seen: Array) -> tuple[float, bool]:
    """Correlation of (n, c) values with a picture's own, and whether they are as a diffusion model sees it: `seen`."""
    fits = {True: _fit(values, seen), False: _fit(values, own)}
    if min(slope for _, slope in fits.values()) <= 0:
        return fits[False][0], True
    scaled = abs(np.log(fits[True][1])) <= abs(np.log(fits[False][1]))
    return fits[bool(scaled)][0], bool(scaled)


def _fit(values: Array, own: Array) -> tuple[float, float]:
    """Correlation of (n, c) values with the picture's own, and their slope over them, each channel about its mean."""
    values, own = values - values.mean(0), own - own.mean(0)
    product, square = float((values * own).sum()), float((own * own).sum())
    length = float(np.sqrt((values * values).sum() * square))
    return (product / length, product / square) if length > 0 and square > 0 else (0.0, 0.0)


def read_latent(
    array: Array,
    config: ModelConfig,
    size: tuple[int, int],
    *,
    scaled: bool = True,
    norm: Normalization | None = None,
) -> jax.Array:
    """The latent of `understand` where the scale is known and no picture is there to compare with.

    Args:
        array, config, size, scaled, norm: see `understand`.

    Returns:
        (1, h, w, c) float32, not scaled.

    Raises:
        InputError: it does not fit the picture, or fits in two layouts.
    """
    return understand(array, config, size, scaled=scaled, norm=norm).latent
