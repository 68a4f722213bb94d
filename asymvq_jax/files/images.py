"""Pictures at the edges: files of any kind to uint8 arrays and back, uint8 to float, grids."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from asymvq_jax.errors import ImageError
from asymvq_jax.files.masks import read_mask
from asymvq_jax.files.pictures import FORMATS, Picture, decode_shown, read_file, read_size, write_picture

__all__ = [
    "FORMATS",
    "ImageError",
    "decode",
    "error_map",
    "grid",
    "parse_size",
    "read",
    "read_mask",
    "read_size",
    "to_float",
    "to_uint8",
    "write",
]


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """Decodes a picture of any mode and orientation to (h, w, 3) uint8; transparency is composed on white.

    Raises:
        ImageError: the bytes are not a picture, or the picture is truncated.
    """
    return decode_shown(data, name)


def read(path: str | epath.Path) -> np.ndarray:
    """Reads a picture file as (h, w, 3) uint8; see `decode`.

    Raises:
        ImageError: the file is missing or no picture.
    """
    return decode_shown(read_file(path), str(path))


def write(path: str | epath.Path, image: np.ndarray) -> None:
    """Writes (h, w, 3) uint8 as PNG, JPEG or WebP (lossless), by the name's ending; replaces a file atomically.

    Raises:
        OutputError: another ending, a place that cannot be written to, or a picture too large for the format.
    """
    write_picture(path, Picture(image))


def to_float(image: jax.Array | np.ndarray) -> jax.Array:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return jnp.asarray(image).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array | np.ndarray) -> np.ndarray:
    """Float in [-1, 1], clipped -> uint8 in [0, 255], rounded to nearest."""
    return np.round((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


# Least width of a grid's cells, and the height of its titles, px.
CELL, HEADER = 128, 16


def grid_size(columns: int, rows: int, size: tuple[int, int], gap: int = 4) -> tuple[int, int]:
    """Height and width of a `grid` of pictures of one size, px."""
    factor = -(-CELL // size[1])
    height, width = size[0] * factor, size[1] * factor
    return HEADER + rows * (height + gap) - gap, columns * (width + gap) - gap


def grid(columns: Sequence[tuple[str, Sequence[np.ndarray]]], gap: int = 4) -> np.ndarray:
    """Lays out titled columns of (h, w, 3) uint8 pictures, one row per picture; all cells have the largest's size.

    Small pictures are enlarged by a whole factor, so that a cell is at least CELL px wide.
    """
    size = tuple(max(p.shape[axis] for _, pictures in columns for p in pictures) for axis in (0, 1))
    factor, rows = -(-CELL // size[1]), len(columns[0][1])
    columns = [(title, [p.repeat(factor, 0).repeat(factor, 1) for p in pictures]) for title, pictures in columns]
    h, w = size[0] * factor, size[1] * factor
    height, width = grid_size(len(columns), rows, (size[0], size[1]), gap)
    canvas = Image.new("RGB", (width, height), "white")
    for i, (title, pictures) in enumerate(columns):
        cell = Image.new("RGB", (w, HEADER), "white")
        ImageDraw.Draw(cell).text((2, 2), title, fill="black")
        canvas.paste(cell, (i * (w + gap), 0))
        for j, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (i * (w + gap), HEADER + j * (h + gap)))
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
