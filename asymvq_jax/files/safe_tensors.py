"""The safetensors format: the head describes all, each tensor is read alone, and a file is written tensor by tensor."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from asymvq_jax.errors import TensorFileError
from asymvq_jax.files.stored import DTYPES, StoredTensor, Table, known_dtype, read_slice

# The format's names of types.
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    **{f"{sign}{bits}": f"{'u' if sign == 'U' else ''}int{bits}" for sign in "IU" for bits in (8, 16, 32, 64)},
}  # fmt: skip
LARGEST_HEAD = 100_000_000


def read_head(path: Path) -> tuple[Table, dict[str, str]]:
    """A file's tensors, none of them read, and its metadata.

    Raises:
        TensorFileError: the file is not readable, not of this format, damaged or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEAD:
            raise _damaged(path, f"its head claims {length} bytes")
        if length > size - 8:
            raise TensorFileError(f"{path} is truncated: its head has {length} bytes, and the file has {size}")
        text = file.read(length)
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its head is not JSON ({error})") from None
    if not isinstance(head, dict):
        raise _damaged(path, "its head is not a table")
    metadata = head.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is not a table")
    spans: list[tuple[int, int]] = []
    table = {name: _entry(path, name, entry, 8 + length, spans) for name, entry in head.items()}
    end = _check_spans(path, spans)
    if 8 + length + end > size:
        missing = 8 + length + end - size
        raise TensorFileError(
            f"{path} is truncated: {missing} of {size + missing} bytes are missing; download it again"
        )
    if 8 + length + end < size:
        raise _damaged(path, f"{size - 8 - length - end} bytes belong to no tensor")
    return table, {str(name): str(value) for name, value in metadata.items()}


def _entry(path: Path, name: str, entry: Any, start: int, spans: list[tuple[int, int]]) -> StoredTensor:
    """One line of the head; its place among the data is added to `spans`."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"tensor {name!r} has no type, shape or place") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise _damaged(path, f"tensor {name!r} has the shape {shape!r} and the place {begin!r} to {end!r}")
    dtype, count = TYPES.get(kind, kind), math.prod(shape)
    if dtype in DTYPES and count * DTYPES[dtype].itemsize != end - begin:
        raise _damaged(path, f"tensor {name!r} of {kind} and shape {shape} has {end - begin} bytes")
    spans.append((begin, end))
    return StoredTensor(tuple(shape), dtype, partial(_load, path, dtype, start + begin, count))


def _load(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    return read_slice(path, known_dtype(dtype, path), offset, count)


def _check_spans(path: Path, spans: list[tuple[int, int]]) -> int:
    """Where the last tensor ends; each has to begin where the one before it ends."""
    spans.sort()
    for (_, end), (begin, _) in itertools.pairwise([(0, 0), *spans]):
        if end != begin:
            raise _damaged(path, f"its tensors {'overlap' if begin < end else 'leave gaps'}")
    return spans[-1][1] if spans else 0


def _damaged(path: Path, reason: str) -> TensorFileError:
    return TensorFileError(f"{path} is not a safetensors file, or a damaged one: {reason}")


def write(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    integers: Collection[str] = (),
    **metadata: str,
) -> None:
    """Writes float32 tensors, one at a time.

    Args:
        path: the file.
        tensors: names and values, in the order of `shapes`.
        shapes: of all of them.
        integers: names of those to write as int64.
        metadata: strings for other programs, and for us.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        kind, size = ("I64", 8) if name in integers else ("F32", 4)
        begin, end = end, end + size * math.prod(shape)
        head[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    # The data begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, value in tensors:
            file.write(np.ascontiguousarray(value, "<i8" if name in integers else "<f4").data)
