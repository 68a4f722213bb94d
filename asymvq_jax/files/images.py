"""Pictures at the edges: files of any kind to uint8 arrays and back, uint8 to float, grids."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from asymvq_jax.errors import ImageError
from asymvq_jax.files.outputs import check_name, write_bytes


def decode(data: bytes, name: str = "image", background: str = "white") -> np.ndarray:
    """Decodes a picture of any mode and orientation to (h, w, 3) uint8; transparency is composed on `background`.

    Raises:
        ImageError: the bytes are no picture, or a truncated one.
    """
    with _reading(name), Image.open(io.BytesIO(data)) as image:
        return np.asarray(_rgb(ImageOps.exif_transpose(image), background))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises for a broken picture into an ImageError that names it."""
    try:
        yield
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's own words name an object in memory.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{name} is not a readable picture: {reason}") from None


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def read(path: str | epath.Path, background: str = "white") -> np.ndarray:
    """Reads a picture file as (h, w, 3) uint8; see `decode`.

    Raises:
        ImageError: the file is missing or no picture.
    """
    return decode(_existing(path).read_bytes(), str(path), background)


def _existing(path: str | epath.Path) -> epath.Path:
    file = epath.Path(path)
    if not file.is_file():
        raise ImageError(f"no picture at {path}")
    return file


def read_size(path: str | epath.Path) -> tuple[int, int]:
    """Height and width of a picture file as `read` returns it, from its head.

    Raises:
        ImageError: the file is missing or no picture.
    """
    file = _existing(path)
    with _reading(str(path)), file.open("rb") as stream, Image.open(stream) as image:
        # For a PNG whose head has none, Pillow would look behind the picture, and decode it for that.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        # Orientations from 5 on are turned by 90 degrees.
        turned = exif.get(0x0112, 1) >= 5
        return image.size if turned else image.size[::-1]


def read_mask(path: str | epath.Path, *, soft: bool = False) -> np.ndarray:
    """Reads a mask file, white = generate, black or transparent = preserve.

    Returns:
        (h, w, 1) uint8, 0 or 1, threshold 0.5; or if `soft` float32 in [0, 1], the file's greys as they are.

    Raises:
        ImageError: the file is missing or no picture.
    """
    grey = read(path, background="black").mean(-1, keepdims=True)
    return (grey / 255).astype(np.float32) if soft else (grey >= 127.5).astype(np.uint8)


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def write(path: str | epath.Path, image: np.ndarray) -> None:
    """Writes (h, w, 3) uint8 as PNG, JPEG or WebP (lossless), by the name's ending; replaces a file atomically.

    Raises:
        OutputError: another ending, or a place that cannot be written to.
        ImageError: a picture too large for the format.
    """
    check_name(path, FORMATS)
    kind = FORMATS[epath.Path(path).suffix.lower()]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    buffer = io.BytesIO()
    try:
        Image.fromarray(image).save(buffer, kind, **options)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: a picture of shape {image.shape} is not possible as {kind}: {error}") from None
    write_bytes(path, buffer.getvalue())


def to_float(image: jax.Array | np.ndarray) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return jnp.asarray(image).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array | np.ndarray) -> np.ndarray:
    """Float in [-1, 1], clipped -> uint8 in [0, 255], rounded to nearest."""
    return np.round((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


# Least width of a grid's cells, px.
CELL = 128


def grid(columns: Sequence[tuple[str, Sequence[np.ndarray]]], gap: int = 4) -> np.ndarray:
    """Lays out titled columns of (h, w, 3) uint8 pictures, one row per picture; all cells have the largest's size.

    Small pictures are enlarged by a whole factor, so that a cell is at least CELL px wide.
    """
    factor = -(-CELL // max(p.shape[1] for _, pictures in columns for p in pictures))
    columns = [(title, [p.repeat(factor, 0).repeat(factor, 1) for p in pictures]) for title, pictures in columns]
    h, w = (max(p.shape[axis] for _, pictures in columns for p in pictures) for axis in (0, 1))
    rows, header = len(columns[0][1]), 16
    canvas = Image.new("RGB", (len(columns) * (w + gap) - gap, header + rows * (h + gap) - gap), "white")
    for i, (title, pictures) in enumerate(columns):
        cell = Image.new("RGB", (w, header), "white")
        ImageDraw.Draw(cell).text((2, 2), title, fill="black")
        canvas.paste(cell, (i * (w + gap), 0))
        for j, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (i * (w + gap), header + j * (h + gap)))
    return np.asarray(canvas)


def error_map(image: np.ndarray, reference: np.ndarray, gain: float = 4.0) -> np.ndarray:
    """|image - reference| of uint8 pictures, mean over channels, times `gain`, as a grey (h, w, 3) uint8 picture."""
    error = np.abs(image.astype(np.float32) - reference.astype(np.float32)).mean(-1, keepdims=True)
    return np.repeat(np.clip(error * gain, 0, 255).astype(np.uint8), 3, axis=-1)


def parse_size(option: str, text: str) -> tuple[int, int]:
    """Height and width from "512x768".

    Raises:
        ImageError: `text` is nothing of the kind; the message names the option.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise ImageError(f"{option} {text}: expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(match[1]), int(match[2])
