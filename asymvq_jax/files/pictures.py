"""A picture as its file has it, from reading to writing: depth, grey, alpha, profile, metadata."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from asymvq_jax.errors import ImageError, OutputError, UnansweredError
from asymvq_jax.files.addresses import bucket_errors, read_bytes
from asymvq_jax.files.decoding import Array, Pixels, UnknownKindError, decode_pixels, opened, orientation, read_tiff
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.metadata import NOTHING, Metadata, read_metadata, save_options
from asymvq_jax.files.outputs import check_name, write_bytes

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# The longest side that a format holds, px.
LONGEST = {"PNG": 2**31 - 1, "JPEG": 65535, "WEBP": 16383}


_ENCODERS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}


@dataclass(frozen=True)
class Picture:
    """A picture, upright, as stored.

    Attributes:
        colour: (h, w, 1) for grey or (h, w, 3), uint8 or uint16.
        alpha: (h, w, 1) of the same type, 0 = transparent; None: opaque.
        metadata: what else the file says.
        notes: what reading it changed or left out, a line each.
    """

    colour: Array
    alpha: Array | None = None
    metadata: Metadata = NOTHING
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        height, width = self.colour.shape[:2]
        return height, width

    @property
    def levels(self) -> int:
        """The value of white, 255 or 65535."""
        return int(np.iinfo(self.colour.dtype).max)

    def shown(self) -> Array:
        """(h, w, 3) of the type of `colour`: as it is seen, on white where it is transparent."""
        colour = self.colour
        if self.alpha is not None:
            share = self.alpha.astype(np.float32) / self.levels
            mixed = colour.astype(np.float32) * share + self.levels * (1 - share)
            colour = np.round(mixed).astype(colour.dtype)
        return colour if colour.shape[2] == 3 else colour.repeat(3, -1)

    def to_uint8(self) -> Array:
        """`shown` in 8 bits, rounded: (h, w, 3) uint8."""
        return narrow(self.shown())

    def to_float(self) -> Array:
        """`shown` as the models take it: (h, w, 3) float32 in [-1, 1]."""
        return self.shown().astype(np.float32) * np.float32(2 / self.levels) - 1

    def painted(self, shown: Array, mask: Array, kept: Array) -> Picture:
        """The picture with other pixels.

        Args:
            shown: (h, w, 3) float32 in [-1, 1], clipped: what is to be seen, on white where it is transparent.
            mask: (h, w, 1) float32; as much as it says, the picture becomes opaque.
            kept: (h, w) bool, where the stored pixels stay as they are, bit for bit.
        """
        white = self.levels
        colour = (np.clip(shown, -1, 1) + 1) * np.float32(white / 2)
        colour = colour.mean(-1, keepdims=True) if self.colour.shape[2] == 1 else colour
        alpha = self.alpha
        if alpha is not None:
            covered: Array = np.maximum(alpha, np.round(mask * white).astype(alpha.dtype))
            share = covered.astype(np.float32) / white
            # The colour that gives `shown` on white; where nothing is seen, what was stored there.
            lifted = (colour - white * (1 - share)) / np.maximum(share, 1 / white)
            colour = np.where(covered == 0, self.colour, lifted)
            alpha = np.where(kept[..., None], alpha, covered)
        colour = np.round(np.clip(colour, 0, white)).astype(self.colour.dtype)
        return replace(self, colour=np.where(kept[..., None], self.colour, colour), alpha=alpha)


def narrow(array: Array) -> Array:
    """uint16 to uint8, rounded; uint8 as it is."""
    return array if array.dtype == np.uint8 else np.round(array.astype(np.float32) / 257).astype(np.uint8)


def read_picture(path: str | epath.Path, *, large: bool = False) -> Picture:
    """Reads a picture file of any kind.

    Args:
        path: the file.
        large: whether more pixels than `decoding.MOST_PIXELS` are wanted.

    Raises:
        ImageError: the file is missing, no picture, damaged, or too large.
    """
    data = read_file(path)
    return decode_picture(data, str(path), large=large)


def read_file(path: str | epath.Path) -> bytes:
    """The bytes of a file.

    Raises:
        ImageError: the file is missing or cannot be read.
        UnansweredError: the service of its bucket does not answer.
    """
    try:
        with bucket_errors(path):
            return read_bytes(path)
    except UnansweredError:
        # Not a fault of the picture, in the place of which training would read another.
        raise
    # Asked only now: in a bucket every question is a request.
    except (FileNotFoundError, IsADirectoryError):
        if epath.Path(path).is_dir():
            raise ImageError(f"{path} is a directory; expected a picture file") from None
        raise ImageError(f"no picture at {path}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def decode_picture(data: bytes, name: str = "image", *, large: bool = False) -> Picture:
    """As `read_picture`, of a file's bytes; messages call it `name`."""
    pixels, metadata = _decode(data, name, large=large, with_metadata=True)
    return Picture(pixels.colour, pixels.alpha, metadata, (*pixels.notes, *metadata.lost))


def decode_shown(data: bytes, name: str = "image", *, large: bool = False) -> Array:
    """(h, w, 3) uint8: what a file shows, on white where it is transparent; spares reading the metadata."""
    pixels, _ = _decode(data, name, large=large, with_metadata=False)
    return Picture(pixels.colour, pixels.alpha).to_uint8()


def _decode(data: bytes, name: str, *, large: bool, with_metadata: bool) -> tuple[Pixels, Metadata]:
    try:
        with opened(data, name, large=large) as image:
            pixels = decode_pixels(image, data)
            if not with_metadata:
                return pixels, NOTHING
            metadata = read_metadata(image)
            if image.mode in ("CMYK", "LAB"):
                # The pixels are no longer what it is for.
                metadata = replace(metadata, profile=None)
            if image.format == "PNG" and (code := dict(_early_chunks(data)).get(b"cICP")):
                # It goes before a profile, and Pillow does not know it.
                metadata = replace(metadata, colour={**metadata.colour, "cicp": code})
            return pixels, metadata
    except UnknownKindError:
        if picture_format(data[:HEAD]) != "TIFF":
            raise
    return read_tiff(data, name, large=large), NOTHING


def read_size(path: str | epath.Path, *, large: bool = False) -> tuple[int, int]:
    """Height and width of a picture file as `read_picture` returns it, from its head.

    Raises:
        ImageError: the file is missing or no picture.
    """
    file = epath.Path(path)
    try:
        with bucket_errors(path):
            is_file = file.is_file()
    except OSError:
        is_file = False
    if not is_file:
        # Says what is wrong.
        read_file(path)
    try:
        with file.open("rb") as stream, opened(stream, str(path), large=large) as image:
            # Orientations from 5 on are turned by 90 degrees.
            turned = orientation(image, stream) >= 5
            return image.size if turned else (image.size[1], image.size[0])
    except UnknownKindError:
        with file.open("rb") as stream:
            if picture_format(stream.read(HEAD)) != "TIFF":
                raise
        height, width = read_picture(path, large=large).size
        return height, width


def check_fits(path: str | epath.Path, size: tuple[int, int]) -> None:
    """Raises OutputError unless a picture of this height and width can be written under the name."""
    kind = FORMATS.get(PurePath(path).suffix.lower(), "PNG")
    if max(size) > LONGEST[kind]:
        raise OutputError(
            f"{path}: a picture of {size[1]} x {size[0]} px cannot be written as {kind}, which holds "
            f"{LONGEST[kind]} px a side at most; name a .png file"
        )


def encode_picture(picture: Picture, kind: str) -> tuple[bytes, tuple[str, ...]]:
    """A picture's file as PNG, JPEG or (lossless) WebP, and what of it the format cannot hold, a line each."""
    colour, alpha, lost = picture.colour, picture.alpha, []
    if kind != "PNG" and picture.levels > 255:
        lost.append(f"{kind} holds 8 bits a channel: the picture's 16 are rounded")
        colour, alpha = narrow(colour), None if alpha is None else narrow(alpha)
    if kind == "JPEG" and alpha is not None:
        lost.append("JPEG holds no alpha: transparent parts are laid onto white")
        colour, alpha = narrow(picture.shown())[..., : colour.shape[2]], None
    grey = colour.shape[2] == 1
    options, unsaid = save_options(picture.metadata, kind, grey=grey and kind != "WEBP")
    options |= _ENCODERS[kind]
    array = colour if alpha is None else np.concatenate([colour, alpha], -1)
    buffer = io.BytesIO()
    if array.dtype == np.uint8:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, kind, **options)
        return buffer.getvalue(), (*lost, *unsaid)
    # Pillow writes no colours of 16 bits, but what else the file is to say.
    Image.new("L" if grey else "RGB", (1, 1)).save(buffer, kind, **options)
    return png16(array, buffer.getvalue()), (*lost, *unsaid)


def png16(array: Array, example: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel.

    Args:
        array: (h, w, c) uint16; 1 to 4 channels for grey, grey and alpha, RGB, RGB and alpha.
        example: a PNG, whose chunks before the pixels are taken over.
    """
    height, width, channels = array.shape
    rows = array.astype(">u2").reshape(height, -1).view(np.uint8)
    # Each byte less the one above, modulo 256: PNG's filter 2.
    differences = rows.copy()
    differences[1:] -= rows[:-1]
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), differences], 1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), *_early_chunks(example)]
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _early_chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """All but the head of what is before the pixels."""
    chunks, at = [], 8
    while at + 8 <= len(png) and (name := png[at + 4 : at + 8]) != b"IDAT":
        length = int.from_bytes(png[at : at + 4], "big")
        if name != b"IHDR":
            chunks.append((name, png[at + 8 : at + 8 + length]))
        at += length + 12
    return chunks


def write_picture(path: str | epath.Path, picture: Picture) -> tuple[str, ...]:
    """Writes a picture as PNG, JPEG or WebP (lossless), by the name's ending; replaces a file atomically.

    Returns:
        What of it the format cannot hold, a line each.

    Raises:
        OutputError: another ending, a place that cannot be written to, or a picture too large for the format.
    """
    check_name(path, FORMATS)
    check_fits(path, picture.size)
    kind = FORMATS[PurePath(path).suffix.lower()]
    try:
        data, lost = encode_picture(picture, kind)
    except (OSError, ValueError) as error:
        height, width = picture.size
        raise ImageError(f"{path}: a picture of {width} x {height} px is not possible as {kind}: {error}") from None
    write_bytes(path, data)
    return lost
