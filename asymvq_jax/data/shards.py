"""Shards of an ArrayRecord data set: written whole or not at all, described by a manifest, verified against it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from PIL import Image
from tqdm import tqdm

from asymvq_jax.data.listing import Picture, Pictures
from asymvq_jax.data.sources import in_order
from asymvq_jax.errors import DataError, ImageError, OutputError, TooSmallError
from asymvq_jax.files import images
from asymvq_jax.files.addresses import bucket_errors, in_bucket
from asymvq_jax.files.outputs import write_bytes, writing

MANIFESTS = "manifests"
FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image(), "file_name": tfds.features.Text()})
SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())
# First bytes of the formats that TFDS's Image feature decodes to three axes: JPEG and PNG.
KEPT_FORMATS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# Why pictures are left out, as manifests and messages have it.
TOO_SMALL, CORRUPT, UNREADABLE = "too small", "corrupt", "unreadable"


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of a data set, and the pictures that belong into it."""

    split: str
    path: epath.Path
    pictures: Pictures
    # A file of this machine that becomes it once it is complete.
    partial: Path


class Content(NamedTuple):
    """What is in a complete shard, and what was left out."""

    pictures: int
    size: int
    small: int
    corrupt: int
    unreadable: int

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Content:
        """What a shard's manifest says."""
        left_out = (len(manifest.get(reason, ())) for reason in (TOO_SMALL, CORRUPT, UNREADABLE))
        return cls(manifest["count"], manifest["bytes"], *left_out)

    @classmethod
    def total(cls, parts: Sequence[Content]) -> Content:
        """The sum over shards."""
        return cls(*map(sum, zip(*parts, strict=True)))

    def __str__(self) -> str:
        unreadable = f", {self.unreadable} unreadable ones" if self.unreadable else ""
        return (
            f"{self.pictures} pictures, {self.size / 1e9:.3g} GB "
            f"({self.small} too small and {self.corrupt} corrupt ones{unreadable} left out)"
        )


def read_content(shard: Shard) -> Content | None:
    """None unless the shard is complete and as its manifest says."""
    if not manifest_of(shard.path).exists():
        return None
    if damage := find_damage(shard.path):
        tqdm.write(f"{damage}; it is written again", file=sys.stderr)
        return None
    return Content.of(read_json(manifest_of(shard.path)))


def manifest_of(shard: epath.Path) -> epath.Path:
    """The file that describes a shard."""
    return shard.parent / MANIFESTS / f"{shard.name}.json"


def find_damage(shard: epath.Path) -> str | None:
    """What a complete shard lacks; None where it is whole."""
    manifest = manifest_of(shard)
    for file in (manifest, shard):
        if not file.exists():
            return f"{file} is missing"
    try:
        stored = read_json(manifest)
        checksum = stored["sha256"]
        Content.of(stored)
    except (DataError, KeyError, TypeError):
        return f"{manifest} is damaged"
    return None if _sha256(shard) == checksum else f"{shard} does not match its checksum"


def read_json(path: epath.Path) -> dict[str, Any]:
    """What `write_json` has written.

    Raises:
        DataError: it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove it and build again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: expected an object; remove it and build again")
    return content


def write_json(path: epath.Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _sha256(path: epath.Path | Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(shard: Path) -> int:
    reader = ArrayRecordReader(str(shard))
    count = int(reader.num_records())
    reader.close()
    return count


def _record(picture: Picture, min_side: int) -> bytes:
    """The serialised record; raises ImageError or OSError where the picture is to be left out."""
    data = _stored(picture)
    if len(data) < picture.size:
        raise DataError(f"{picture.name} has become shorter since it was listed")
    # Decoded as training does, so that what is corrupt or too small there is so here.
    image = images.decode(data, picture.name)
    if min(image.shape[:2]) < min_side:
        raise TooSmallError(f"{picture.name}: its shorter side is below {min_side} px")
    if not data.startswith(KEPT_FORMATS):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()
    example = FEATURES.encode_example({"image": data, "file_name": picture.name})
    # Else the order of the features changes from one process to the next.
    return bytes(SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True))


def _stored(picture: Picture) -> bytes:
    """A picture's bytes; raises OSError where they cannot be read."""
    address = os.fsdecode(picture.file)
    if in_bucket(address):
        scheme, _, path = address.partition("://")
        with bucket_errors(address):
            return bytes(fsspec.filesystem(scheme).cat_file(path, picture.offset, picture.offset + picture.size))
    with open(picture.file, "rb") as file:
        file.seek(picture.offset)
        return file.read(picture.size)


def write_shard(shard: Shard, min_side: int, pool: ThreadPoolExecutor, ahead: int, bar: tqdm[Any]) -> Content:
    """Writes a shard and its manifest, and names the pictures that are left out.

    Args:
        shard: where it goes, and what belongs into it.
        min_side: pictures whose shorter side is below this are left out, px.
        pool: threads that read and decode.
        ahead: how many pictures they may have ready.
        bar: moves by one for every picture.

    Raises:
        OutputError: it cannot be written.
        DataError: a picture changed while it was read.
    """
    kept: list[str] = []
    left_out: dict[str, list[str]] = {TOO_SMALL: [], CORRUPT: [], UNREADABLE: []}
    size = 0
    try:
        # Grain wants groups of one record.
        writer = ArrayRecordWriter(str(shard.partial), "group_size:1")
        for picture, future in in_order(pool, partial(_record, min_side=min_side), shard.pictures, ahead):
            bar.update()
            try:
                record = future.result()
            except TooSmallError:
                left_out[TOO_SMALL].append(picture.name)
            except ImageError as error:
                left_out[CORRUPT].append(picture.name)
                tqdm.write(f"left out: {error}", file=sys.stderr)
            except OSError as error:
                left_out[UNREADABLE].append(picture.name)
                tqdm.write(f"left out: {picture.name} cannot be read: {error.strerror or error}", file=sys.stderr)
            else:
                writer.write(record)
                kept.append(picture.name)
                size += len(record)
        writer.close()
    except RuntimeError as error:
        raise OutputError(f"{shard.path} cannot be written: {error}") from None
    if _records(shard.partial) != len(kept):
        raise OutputError(f"{shard.partial} holds {_records(shard.partial)} records after {len(kept)} were written")
    manifest = {
        "sha256": _sha256(shard.partial),
        "bytes": size,
        "count": len(kept),
        "pictures": kept,
        **left_out,
    }
    with writing(shard.path):
        if in_bucket(shard.path):
            fsspec.filesystem(str(shard.path).partition("://")[0]).put_file(str(shard.partial), str(shard.path))
            shard.partial.unlink()
        else:
            shard.partial.replace(shard.path)
    write_json(manifest_of(shard.path), manifest)
    return Content.of(manifest)
