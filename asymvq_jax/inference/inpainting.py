"""Inpaints one picture: an edited latent is decoded so that the pixels outside the mask stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import cv2
import jax
import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped, UInt8

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.files import images
from asymvq_jax.files.masks import HAZE, generated
from asymvq_jax.files.pictures import Picture
from asymvq_jax.inference.blend import BAND, MIXING, Blend, check_blend, composite
from asymvq_jax.inference.crop import Crop, Region
from asymvq_jax.inference.edges import distance
from asymvq_jax.inference.latents import Layout, Reading, understand
from asymvq_jax.inference.whole import check_condition, decode, encode
from asymvq_jax.models.autoencoder import Autoencoder

Array = npt.NDArray[Any]
Keep = Literal["model", "exact"]


class InpaintResult(NamedTuple):
    """A finished picture, (h, w, 3) uint8, and its tone step at the mask's edge (None where nothing was pasted)."""

    image: UInt8[np.ndarray, "h w 3"]
    tone_step: float | None


class Inpainted(NamedTuple):
    """A finished picture with all that its file had, and what is worth saying about it.

    Attributes:
        picture: the result.
        tone_step: see `InpaintResult`.
        reading: how the latent was read; None: the picture's own.
        region: what was cut out and filled; None: the whole picture.
    """

    picture: Picture
    tone_step: float | None
    reading: Reading | None
    region: Region | None = None


def inpaint(
    model: Autoencoder,
    image: UInt8[np.ndarray, "h w 3"],
    mask: Shaped[np.ndarray, "h w"] | Shaped[np.ndarray, "h w 1"],
    latent: Array | None = None,
    *,
    keep: Keep | None = None,
    blend: Blend | None = None,
    band: int | None = None,
    crop: Crop | None = None,
    edited: Array | None = None,
    scaled: bool | None = None,
    layout: Layout | None = None,
    encode: Callable[..., jax.Array] = encode,
    decode: Callable[..., jax.Array | Array] = decode,
) -> InpaintResult:
    """Decodes a latent so that the picture's unmasked pixels stay.

    Args:
        model: an autoencoder; one with a condition branch unless `keep` is "exact".
        image: (h, w, 3) uint8, of any size.
        mask: (h, w) or (h, w, 1); bool, or numbers in [0, 1]: 1 = generate, 0 = preserve.
        latent: an edited latent; None: the picture's own. With `crop`, it is the region's at its working size.
        keep: "model" returns what the decoder made; "exact" also pastes the original's pixels, bit for bit, wherever
            they are preserved. None: "model", or with `blend`, `band` or `crop`, which can do no other, "exact".
        blend: how "exact" sets the decoder's fill into the original; see `inference.blend.composite`. "feather" and
            "multiband" mix the two in a band around the mask, where kept pixels change. None: "none", with which every
            kept pixel stays, or with a band "feather".
        band: its width, px; None: 8 where there is one.
        crop: fills only the mask's surroundings, scaled to the model's size, and leaves the rest of the picture alone;
            None: the whole picture at its own size.
        edited: (h, w, 3) of the picture's type, an edited picture whose latent is decoded instead of the picture's own;
            excludes `latent`. See `inference.changes.find_changes` for its mask.
        scaled, layout: how the latent is stored; see `latents.understand`.
        encode, decode: for large pictures, the functions of `inference.strips`, or `inference.whole`'s with a mesh.

    Returns:
        The picture; and with keep="exact" the tone step at the mask's edge, before any blending: the mean absolute
        difference between the decoder's and the original's colours over the preserved pixels next to the mask (in the
        band, where there is one), in levels of 0 to 255.

    Raises:
        InputError: an array has a wrong shape or type, their sizes differ, or the model cannot preserve anything.
    """
    image = check_image(image)
    done = inpaint_picture(
        model, Picture(image), check_mask(mask, image), latent, keep=keep, blend=blend, band=band, crop=crop,
        edited=None if edited is None else check_image(edited),
        scaled=scaled, layout=layout, encode=encode, decode=decode,
    )  # fmt: skip
    return InpaintResult(done.picture.colour, done.tone_step)


def inpaint_picture(
    model: Autoencoder,
    picture: Picture,
    mask: Array,
    latent: Array | None = None,
    *,
    keep: Keep | None = None,
    blend: Blend | None = None,
    band: int | None = None,
    crop: Crop | None = None,
    edited: Array | None = None,
    scaled: bool | None = None,
    layout: Layout | None = None,
    encode: Callable[..., jax.Array] = encode,
    decode: Callable[..., jax.Array | Array] = decode,
) -> Inpainted:
    """As `inpaint`, of a picture with its depth, alpha and metadata; `mask` is (h, w, 1), of numbers in [0, 1]."""
    keeping = ways_of_keeping(keep, blend, band, exact="crop" if crop is not None else "")
    if keeping.keep == "model":
        check_condition(model.config)
    if edited is not None and edited.shape[:2] != picture.size:
        raise InputError(f"the edited picture has shape {edited.shape}: expected that of the picture, {picture.size}")
    if edited is not None and latent is not None:
        raise InputError("an edited picture and a latent: expected one of them")
    region = None if crop is None else crop.region(mask, model.config.downsampling)
    whole = picture if edited is None else Picture(edited)
    seen, source, small = (
        (picture, whole, mask)
        if region is None
        else (region.enter(picture), region.enter(whole), region.enter_mask(mask))
    )
    decoded, reading = _decoded(
        model, seen, small.astype(np.float32), source if latent is None else latent,
        margin=margin_of(model.config, keeping), scaled=scaled, layout=layout, encode=encode, decode=decode,
    )  # fmt: skip
    return Inpainted(*compose(picture, decoded, mask, keeping, region), reading, region)


def _decoded(
    model: Autoencoder,
    picture: Picture,
    mask: Array,
    source: Picture | Array,
    *,
    margin: int,
    scaled: bool | None,
    layout: Layout | None,
    encode: Callable[..., jax.Array],
    decode: Callable[..., jax.Array | Array],
) -> tuple[Array, Reading | None]:
    """What the decoder makes of a latent, or of another picture's, beside a picture.

    Returns:
        (h, w, 3) float32, and how the latent was read.
    """
    pixels = picture.to_float()[None]
    reading = None
    if isinstance(source, Picture):
        z = encode(model, pixels if source is picture else source.to_float()[None])
    else:
        reading = understand(
            np.asarray(source), model.config, picture.size, own=lambda: encode(model, pixels), mask=mask,
            layout=layout, scaled=scaled, norm=model.normalization(),
        )  # fmt: skip
        z = reading.latent
    seen = (pixels, mask[None]) if model.config.condition else (None, None)
    decoded = np.asarray(decode(model, z, *seen, margin=margin)[0])
    return decoded[: picture.size[0], : picture.size[1]], reading


class Keeping(NamedTuple):
    """How pixels are kept; see `inpaint`."""

    keep: Keep
    blend: Blend = "none"
    # px; what does not mix has none.
    band: int = BAND


def ways_of_keeping(
    keep: str | None = None, blend: Blend | None = None, band: int | None = None, *, exact: str = ""
) -> Keeping:
    """How pixels are kept, where the user has not said it; see `inpaint`.

    Args:
        keep, blend, band: as given; None: not.
        exact: what else was asked for that keeps them exactly, or "".

    Raises:
        InputError: one of them is unknown, or they contradict each other or `exact`.
    """
    if keep not in (None, "model", "exact"):
        raise InputError(f"keep={keep!r}: expected 'model' or 'exact'")
    result = Keeping(
        "model" if keep == "model" or not (keep or exact or blend is not None or band is not None) else "exact",
        blend or ("none" if band is None else "feather"),
        BAND if band is None else band,
    )
    check_blend(result.blend, result.band)
    if keep == "model" and (exact or result.blend != "none"):
        what = exact or (f"blend={blend}" if blend else f"band={band}")
        raise InputError(f"keep='model' does not go with {what}: expected keep='exact', or the decoder's result alone")
    if band and result.blend not in MIXING:
        raise InputError(f"band={band} has no effect with blend={blend}: expected blend {' or '.join(MIXING)}")
    return result


def margin_of(config: ModelConfig, keeping: Keeping) -> int:
    """The margin to decode with, px: one pixel of the latent where nothing but the masked pixels will be used."""
    only_masked = keeping.keep == "exact" and keeping.blend not in MIXING
    return config.downsampling if config.condition and only_masked else 0


def compose(
    picture: Picture,
    decoded: Array,
    mask: Array,
    keeping: Keeping,
    region: Region | None = None,
) -> tuple[Picture, float | None]:
    """A picture from its original and what a decoder made of it.

    Args:
        picture: the original.
        decoded: (h, w, 3) float32 in [-1, 1], clipped; with a region, of its working size.
        mask: (h, w, 1), of the original's size; 1 = generate.
        keeping: how pixels are kept.
        region: what of the picture was decoded; None: all of it.

    Returns:
        The picture, and the tone step where pixels were pasted.
    """
    if region is not None:
        part, tone = compose(region.cut(picture), region.leave(decoded), region.of(mask), keeping)
        return region.stitch(part, picture), tone
    mask = mask.astype(np.float32)
    if keeping.keep == "model":
        return picture.painted(decoded, mask, np.zeros(picture.size, bool)), None
    scale = np.float32(picture.levels / 2)
    original = picture.shown()
    # In the picture's own depth, as the decoder's result alone would be written.
    made = np.round((np.clip(decoded, -1, 1) + 1) * scale).astype(original.dtype)
    # What nobody sees of a mask does not undo an exact copy.
    masked = mask > HAZE
    far = distance(~masked[..., 0])
    width = keeping.band if keeping.blend in MIXING else 0
    near = (far > 0) & (far <= max(width, 1))
    step = np.abs(made.astype(np.float32) - original.astype(np.float32))[near]
    mixed = composite(made, original, masked, keeping.blend, keeping.band).astype(np.float32) / scale - 1
    done = picture.painted(mixed, mask, far > width)
    return done, float(step.mean()) * 255 / picture.levels if step.size else 0.0


def paste(result: Array, original: Array, mask: Array, band: int = BAND, blend: Blend = "feather") -> InpaintResult:
    """Sets the original's preserved pixels over `result`, both (h, w, 3) uint8; see `inpaint` (keep="exact")."""
    keeping = Keeping("exact", blend, band)
    done, step = compose(Picture(original), np.asarray(images.to_float(result)), mask, keeping)
    return InpaintResult(done.colour, step)


def check_image(image: Array) -> Array:
    """A picture as NumPy's array; raises InputError unless it is (h, w, 3) uint8."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"the picture has shape {image.shape}: expected (h, w, 3), of RGB")
    if image.dtype != np.uint8:
        held = f", holding {image.min():g} to {image.max():g}" if image.dtype.kind in "fiub" else ""
        raise InputError(f"the picture is of type {image.dtype}{held}: expected uint8, of 0 to 255")
    return image


def check_mask(mask: Array, image: Array) -> Array:
    """Brings a mask to (h, w, 1) float32.

    Raises:
        InputError: its shape, type or size is wrong, or it has values outside [0, 1].
    """
    mask = np.asarray(mask)
    shape = mask.shape
    mask = mask[..., None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.shape[2] != 1 or mask.dtype.kind not in "fiub":
        raise InputError(f"the mask has shape {shape} and type {mask.dtype}: expected (h, w) or (h, w, 1), of numbers")
    if mask.shape[:2] != image.shape[:2]:
        (h, w), (ih, iw) = mask.shape[:2], image.shape[:2]
        raise InputError(f"the mask is {w} x {h} px and the picture {iw} x {ih} px; they must have the same size")
    mask = mask.astype(np.float32)
    if not ((mask >= 0) & (mask <= 1)).all():
        raise InputError(
            f"the mask has values from {mask.min()} to {mask.max()}: expected 0 (preserve) to 1 (generate)"
        )
    return mask


def thin_parts(mask: Array, config: ModelConfig) -> str:
    """What to say of the parts of a mask that a decoder does not see at the latent's resolution, or "".

    Args:
        mask: (h, w, 1), 1 = generate.
        config: the model's, which says how masks are reduced.
    """
    if not config.condition or config.mask_reduction != "nearest":
        return ""
    count, labels = cv2.connectedComponents(generated(mask)[..., 0].astype(np.uint8), connectivity=8)
    step = config.downsampling
    lost = count - 1 - np.count_nonzero(np.unique(labels[::step, ::step]))
    if not lost:
        return ""
    return (
        f"{lost} of {count - 1} parts of the mask are so small or thin that the decoder, which takes one pixel of "
        f"{step} x {step} there, does not see them at the latent's resolution: widen them to {step} px, or use "
        "--crop-and-stitch, which enlarges small ones"
    )
