"""What inputs are, independent of their paths: the order and the digests by which a run knows them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Identity(NamedTuple):
    """A list of pictures: how many, and a digest of their names in order."""

    pictures: int
    digest: str

    def __str__(self) -> str:
        return f"{self.pictures} pictures (digest {self.digest})"


def name_key(name: str) -> int:
    """A hash of a picture's name within its source, from 0 to 2**64 - 1.

    By it pictures are ordered and held out, so that another picture changes neither for those that are there.
    """
    # Names of files need not be text.
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")


def identify(names: Iterable[str]) -> Identity:
    """The identity of a list of pictures with these names."""
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
        count += 1
    return Identity(count, digest.hexdigest()[:16])


def digest_arrays(arrays: Mapping[str, ArrayLike]) -> str:
    """A digest of arrays by name: of their names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.shape}\0{array.dtype}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
