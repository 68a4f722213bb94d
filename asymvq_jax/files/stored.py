"""A tensor in a file: what its head says of it, and how to read it when it is wanted, not before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from asymvq_jax.errors import TensorFileError

# NumPy's type of each name; float8 and bfloat16 are those of ml_dtypes.
DTYPES: Mapping[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in (
            "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        )
    },
}  # fmt: skip


class Shaped(Protocol):
    """An array, a stored tensor, or a shape alone."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weights file, not read yet."""

    shape: tuple[int, ...]
    # A key of DTYPES, or what the file calls a type that we do not have.
    dtype: str
    # The numbers in the file's type, in order, in any shape.
    load: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """The tensor; floating-point numbers as float32 (narrower ones widen exactly), others as they are stored.

        Raises:
            TensorFileError: of a type that we do not have, or the file has changed or is damaged.
        """
        value = self.load().reshape(self.shape)
        return value if value.dtype.kind in "iub" else value.astype(np.float32, copy=False)

    def reshaped(self, shape: tuple[int, ...]) -> StoredTensor:
        """The same numbers in the same order, in a shape of as many."""
        return replace(self, shape=shape)

    def part(self, index: int, count: int) -> StoredTensor:
        """One of `count` equal parts along the first axis."""
        rows = self.shape[0] // count
        # One that cannot be split is misshapen, and is named as such.
        return replace(
            self,
            shape=(rows, *self.shape[1:]),
            load=lambda: self.load().reshape(self.shape)[index * rows : (index + 1) * rows],
        )


Table = dict[str, StoredTensor]


def known_dtype(name: str, path: Path) -> np.dtype:
    """NumPy's type of a stored tensor's.

    Raises:
        TensorFileError: there is none.
    """
    if name not in DTYPES:
        raise TensorFileError(
            f"{path}: a tensor of type {name} is wanted, which is not supported; get the file in float32 or float16"
        )
    return DTYPES[name]


def read_slice(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """`count` numbers of a file from byte `offset` on.

    Raises:
        TensorFileError: the file cannot be read, or ends before.
    """
    try:
        # As bytes: fromfile does not know the types of ml_dtypes.
        data = np.fromfile(path, np.uint8, count=count * dtype.itemsize, offset=offset)
    except OSError as error:
        raise TensorFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) < count * dtype.itemsize:
        raise TensorFileError(f"{path} is truncated: it ends within a tensor")
    return data.view(dtype)


def misfits(tensors: Mapping[str, Shaped], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with `tensors`, a line each, where `expected` has the name and shape of every one."""
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected = [f"unexpected: {name} {value.shape}" for name, value in tensors.items() if name not in expected]
    misshapen = [
        f"misshapen: {name} {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + unexpected + misshapen


def fitted(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> Table:
    """`tensors` with the expected shapes where only axes of length 1 differ: linear layers and 1x1 convolutions."""
    result = dict(tensors)
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]:
            result[name] = tensor.reshaped(shape)
    return result
