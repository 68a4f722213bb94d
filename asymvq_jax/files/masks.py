"""What a mask file means: one function decides, says how it has read it, and refuses what could mean two things.

1 = generate, 0 = preserve. Masks are uint8, 0 or 1, or float32 where greys are kept; networks take them as float32.
What has to decide by pixel asks `generated`, the one threshold; what blends begins above `HAZE`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal, get_args

import cv2
import numpy as np
from etils import epath

from asymvq_jax.errors import ImageError, InputError, MaskError
from asymvq_jax.files.decoding import Array, from_floats
from asymvq_jax.files.pictures import Picture, decode_picture, read_file, read_size
from asymvq_jax.files.tensors import NUMPY, read_numpy

Channel = Literal["grey", "red", "green", "blue", "alpha"]
CHANNELS: tuple[str, ...] = get_args(Channel)

# What nobody can see: the tail of a wide blur, or a JPEG's black. As much from white is white.
HAZE = 2.5 / 255
# Two values up to this are black and white also where greys are kept.
_LABELS = 32
# Width of the neighbourhood in which a bright value explains dark ones, px.
_BLUR = 9
# Channels that differ by less are grey: a JPEG's colours are not quite equal.
_COLOURED = 24 / 255
_HOW = (
    "white = generate, black = keep; name the channel by --mask-channel, and --invert-mask if it is the other way round"
)


@dataclass(frozen=True)
class Mask:
    """A mask and how its file was understood.

    Attributes:
        values: (h, w, 1); uint8, 0 or 1, or for a soft mask float32 in [0, 1].
        source: what of the file it is, such as "alpha".
        doubt: why it may be meant otherwise, or "".
    """

    values: Array
    source: str
    doubt: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def empty(self) -> bool:
        """Whether nothing is to be generated."""
        return not (self.values > HAZE).any()

    @property
    def full(self) -> bool:
        """Whether everything is to be generated."""
        return bool((self.values >= 1 - HAZE).all())

    def describe(self) -> str:
        """Such as "mask from alpha, 14% generated"."""
        return f"mask from {self.source}, {percent(self.values)} generated"

    def warning(self, name: str) -> str:
        """What is odd about the mask `name`, in one line, or ""."""
        if self.empty:
            return f"warning: {name} is black: nothing is generated, and the picture is given back as it is"
        if self.full:
            return f"warning: {name} is white everywhere: nothing of the picture is kept"
        return f"warning: mask {name} {self.doubt}" if self.doubt else ""


def generated(mask: Array) -> Array:
    """Where a mask of any type, numbers in [0, 1], says generate: bool, of its shape."""
    return np.asarray(mask >= 0.5)


def percent(mask: Array) -> str:
    """The share of a mask that is generated; never 0% or 100% where it is neither."""
    share = float(mask.mean())
    if 0 < share < 0.005:
        return f"{100 * share:.2g}%"
    if 0.995 <= share < 1:
        return f"{min(100 * share, 99.99):.2f}%"
    return f"{share:.0%}"


def read_mask(path: str | epath.Path, *, soft: bool = False) -> Array:
    """The values of `load_mask`: (h, w, 1)."""
    return load_mask(path, soft=soft).values


def load_mask(
    path: str | epath.Path,
    *,
    soft: bool = False,
    channel: Channel | None = None,
    invert: bool = False,
    large: bool = False,
) -> Mask:
    """Reads a mask file of any kind.

    Args:
        path: the file.
        soft: whether greys are kept; otherwise the threshold is 0.5.
        channel: what of the file is the mask; None: what `understand` finds.
        invert: whether black is to be generated.
        large: see `pictures.read_picture`.

    Raises:
        ImageError: the file is missing or not a picture.
        MaskError: it could mean two things.
    """
    return decode_mask(read_file(path), str(path), soft=soft, channel=channel, invert=invert, large=large)


def decode_mask(
    data: bytes,
    name: str,
    *,
    soft: bool = False,
    channel: Channel | None = None,
    invert: bool = False,
    large: bool = False,
) -> Mask:
    """As `load_mask`, of a file's bytes; messages call it `name`."""
    picture = _from_numpy(data, name) if data.startswith(NUMPY) else decode_picture(data, name, large=large)
    lossy = PurePath(name).suffix.lower() not in (".png", ".bmp", ".tif", ".tiff", ".gif") and data[:2] == b"\xff\xd8"
    try:
        return understand(picture, soft=soft, channel=channel, invert=invert, lossy=lossy)
    except MaskError as error:
        raise MaskError(f"mask {name} {error}") from None


def read_mask_size(path: str | epath.Path) -> tuple[int, int]:
    """Height and width of a mask file, from its head unless it is an array.

    Raises:
        ImageError: the file is missing or not a picture.
    """
    file = epath.Path(path)
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(NUMPY)) == NUMPY:
                return _from_numpy(read_file(path), path).size
    return read_size(path)


def turned(mask: tuple[int, int], picture: tuple[int, int]) -> str:
    """What to add to a message about two sizes where one is the other turned by 90 degrees."""
    hint = "; one of them is turned: pictures are read as they are shown, by the orientation that EXIF gives them"
    return hint if mask == picture[::-1] and mask != picture else ""


def _from_numpy(data: bytes, path: str | epath.Path) -> Picture:
    """A mask as segmentation models save it: one plane of bool, of 8 or 16 bits, or of 0 to 1, with axes of length 1.

    Raises:
        MaskError: an array of another kind.
    """
    try:
        array = read_numpy(io.BytesIO(data))
    except InputError as error:
        raise MaskError(f"mask {path} {error}") from None
    assert not isinstance(array, dict)
    plane = array.squeeze()
    if plane.ndim != 2:
        raise MaskError(f"mask {path} is an array of shape {array.shape}: expected one plane, (h, w)")
    if plane.dtype == np.bool_:
        return Picture(plane[..., None] * np.uint8(255))
    if plane.dtype.kind == "f":
        try:
            return Picture(from_floats(plane[..., None]))
        except ImageError as error:
            raise MaskError(f"mask {path} {error}") from None
    if plane.dtype.kind not in "iu" or plane.min() < 0 or plane.max() > 65535:
        raise MaskError(f"mask {path} is an array of {plane.dtype}: expected bool, 8 or 16 bits, or 0 to 1")
    return Picture(plane[..., None].astype(np.uint8 if plane.max() < 256 else np.uint16))


def understand(
    picture: Picture, *, soft: bool = False, channel: Channel | None = None, invert: bool = False, lossy: bool = False
) -> Mask:
    """Decides what of a picture is the mask.

    A channel that is named is taken. Otherwise a transparency that varies decides: colours of one kind on it are
    strokes, and a picture with holes is to be generated where it was erased. Without one, brightness decides: white, or
    one colour, on black; or the values 0 and 1, as programs write labels.

    Args:
        picture: what the file holds.
        soft, channel, invert: see `load_mask`.
        lossy: whether the file is a JPEG, whose black and white are not exact.

    Raises:
        MaskError: it could mean two things, or has no such channel; the message begins with a verb.
    """
    colour = picture.colour.astype(np.float32) / picture.levels
    alpha = None if picture.alpha is None else picture.alpha.astype(np.float32) / picture.levels
    if channel is not None:
        values, source = _named(picture, channel, soft, lossy)
    elif alpha is not None and alpha.min() < 1 - HAZE:
        values, source = _from_alpha(picture, colour, alpha, soft)
    else:
        values, source = _from_colour(picture, colour, soft, lossy)
    values = 1 - values if invert else values
    doubt = ""
    if not soft and _in_between(values) > 0.5:
        doubt = f"is neither black nor white in most places, and is cut at half brightness: expected {_HOW}"
    values = values.astype(np.float32) if soft else generated(values).astype(np.uint8)
    return Mask(values, f"{source}, inverted" if invert else source, doubt)


def _named(picture: Picture, channel: Channel, soft: bool, lossy: bool) -> tuple[Array, str]:
    if channel not in CHANNELS:
        raise MaskError(f"cannot be read by its channel {channel!r}: expected one of {', '.join(CHANNELS)}")
    if channel == "alpha":
        if picture.alpha is None:
            raise MaskError("has no alpha channel, which --mask-channel names")
        return picture.alpha.astype(np.float32) / picture.levels, "alpha"
    stored = picture.colour
    if channel == "grey":
        plane = stored.mean(-1, keepdims=True).round().astype(stored.dtype) if stored.shape[2] == 3 else stored
    else:
        index = {"red": 0, "green": 1, "blue": 2}[channel]
        plane = stored[..., min(index, stored.shape[2] - 1)][..., None]
    values, how = _levels(plane, soft, lossy)
    return values, f"{channel}{how}"


def _from_alpha(picture: Picture, colour: Array, alpha: Array, soft: bool) -> tuple[Array, str]:
    """A picture that is transparent in places."""
    if alpha.max() < HAZE:
        return np.zeros_like(alpha), "alpha"
    visible = colour[alpha[..., 0] > 0.1]
    visible = visible if len(visible) else colour[alpha[..., 0] > 0]
    first = np.median(visible, 0)
    if np.abs(visible - first).max() < _COLOURED:
        if first.max() < _COLOURED:
            opaque = percent(alpha)
            raise MaskError(
                f"is black with a varying alpha, so that either its opaque part ({opaque}) or its transparent one "
                "may be meant: --mask-channel alpha generates the opaque part, with --invert-mask the transparent one"
            )
        return alpha, f"alpha ({_colour_name(first)} strokes on transparency)"
    if np.ptp(visible, axis=-1).max() < _COLOURED and _in_between(visible.mean(-1)) < 0.5:
        brightness = colour.mean(-1, keepdims=True)
        return brightness * alpha, "brightness, with black where it is transparent"
    return 1 - alpha, "alpha (erased where transparent)"


def _from_colour(picture: Picture, colour: Array, soft: bool, lossy: bool) -> tuple[Array, str]:
    """An opaque picture."""
    spread = np.ptp(colour, axis=-1)
    if colour.shape[2] == 1 or spread.max() < _COLOURED:
        stored = picture.colour
        plane = stored.mean(-1, keepdims=True).round().astype(stored.dtype) if stored.shape[2] == 3 else stored
        values, how = _levels(plane, soft, lossy)
        return values, f"brightness{how}"
    # Strokes: all that is not black is of one colour, if less bright at soft edges.
    most = colour.max(-1)
    bright = float(most.max())
    strokes = most > bright / 2
    direction = colour[strokes] / most[strokes][:, None]
    main = np.median(direction, 0)
    if np.abs(direction - main).max() > 0.25 or np.median(spread[strokes]) < _COLOURED:
        kinds = len(np.unique(picture.colour.reshape(-1, 3)[:: max(1, most.size // 2**16)], axis=0))
        raise MaskError(f"is a picture of {kinds} colours or more, not a mask: expected {_HOW}")
    if strokes.all():
        raise MaskError(f"is {_colour_name(main)} everywhere, not a mask: expected {_HOW}")
    return (most / bright)[..., None], f"{_colour_name(main)} on black"


def _levels(plane: Array, soft: bool, lossy: bool) -> tuple[Array, str]:
    """(h, w, 1) greys as stored to [0, 1], and how they were scaled where they are not plain black to white."""
    white = int(np.iinfo(plane.dtype).max)
    values = np.unique(plane)
    low, high = int(values[0]), int(values[-1])
    if high == 0:
        return plane.astype(np.float32), ""
    if not lossy and low == 0 and len(values) == 2 and high < (_LABELS if soft else white):
        return (plane == high).astype(np.float32), f" (0 and {high} as black and white)"
    if not lossy and white == 65535 and high <= 255:
        return plane.astype(np.float32) / 255, " (0 to 255 in 16 bits)"
    scaled = plane.astype(np.float32) / white
    if not lossy and low == high == 1:
        raise MaskError("has the value 1 everywhere, which may mean all or nothing: expected " + _HOW)
    few = len(values) <= 16
    if not lossy and few and low == 0 and len(values) > 2 and _labelled(scaled) > 0.002:
        raise MaskError(
            f"has the values {_listed(values)}, as labels have: which of them are to be generated? Expected {_HOW}"
        )
    if HAZE < scaled.max() < 0.5 and not soft:
        raise MaskError(
            f"has no value above half ({high} of {white} is the brightest), so that nothing would be generated: "
            f"expected {_HOW}; or blend by its greys with --soft-mask"
        )
    return scaled, ""


def _labelled(scaled: Array) -> float:
    """The share of values that are almost black and not at the edge of something bright, as a blur's are."""
    bright = cv2.dilate(generated(scaled[..., 0]).astype(np.uint8), np.ones((_BLUR, _BLUR), np.uint8))
    return float(np.mean((scaled[..., 0] > 0) & (scaled[..., 0] <= 1 / 8) & (bright == 0)))


def _in_between(values: Array) -> float:
    """The share of values in [0, 1] that are clearly neither black nor white."""
    return float(np.mean((values > 0.06) & (values < 0.94)))


def _listed(values: Array) -> str:
    shown = [str(value) for value in values[:6]]
    return ", ".join(shown) + (" ..." if len(values) > 6 else "")


def _colour_name(colour: Array) -> str:
    """The nearest of the colours that people paint with."""
    colour = np.broadcast_to(colour, 3)
    names = {"black": (0, 0, 0), "white": (1, 1, 1), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1),
             "yellow": (1, 1, 0), "cyan": (0, 1, 1), "magenta": (1, 0, 1), "grey": (0.5, 0.5, 0.5)}  # fmt: skip
    return min(names, key=lambda name: float(np.abs(np.asarray(names[name]) - colour).sum()))


def reduce_mask(mask: Array, size: tuple[int, int]) -> Array:
    """A mask at another size, where any masked pixel counts: the maximum of those that a pixel covers.

    Args:
        mask: (..., h, w, 1) of any type.
        size: height and width; a side that grows repeats its pixels.

    Returns:
        (..., *size, 1) of the same type.
    """
    for axis, side in ((-3, size[0]), (-2, size[1])):
        if mask.shape[axis] != side:
            starts = np.arange(side) * mask.shape[axis] // side
            mask = np.maximum.reduceat(mask, starts, axis=axis)
    return mask


def resized(mask: Mask, size: tuple[int, int]) -> Mask:
    """`reduce_mask` of a mask with its source."""
    return mask if mask.size == size else replace(mask, values=reduce_mask(mask.values, size))
