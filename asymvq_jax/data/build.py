"""Makes a TFDS data set of ArrayRecord shards from pictures.

python -m asymvq_jax.data.build SOURCE TARGET --name my_photos [--min-side 256] writes TARGET/my_photos/1.0.0, which
--data.source=tfds --data.path=my_photos --data.data_dir=TARGET reads. SOURCE is a directory tree, a .tar or a .tar.gz;
tars inside either are read too. The pictures' bytes are kept. The same command again goes on after the last complete
shard. python -m asymvq_jax.data.build TARGET --name my_photos --check reads everything back.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sqlite3
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from PIL import Image
from tqdm import tqdm

from asymvq_jax.config import DataConfig
from asymvq_jax.data.sources import SUFFIXES, TFDS, in_order, is_hidden, is_picture, visible_files
from asymvq_jax.errors import DataError, ImageError, OutputError, TooSmallError
from asymvq_jax.files import images
from asymvq_jax.files.outputs import try_out, write_bytes, writing

VERSION = "1.0.0"
MANIFESTS = "manifests"
FEATURES = tfds.features.FeaturesDict({"image": tfds.features.Image(), "file_name": tfds.features.Text()})
SERIALIZER = tfds.core.ExampleSerializer(FEATURES.get_serialized_info())
# First bytes of the formats that TFDS's Image feature decodes to three axes: JPEG and PNG.
KEPT_FORMATS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
GZIP = b"\x1f\x8b"


def build(
    source: str,
    target: str,
    name: str,
    *,
    held_out: float | str = 0.02,
    min_side: int = 0,
    shard_mib: float = 256,
    workers: int = 1,
) -> Path:
    """Writes the data set, or what is missing of it; prints what it does.

    Every shard is written under a hidden name, renamed once it is complete, and described by a manifest with the names
    of its pictures and its SHA-256; the directory has its name once all are there. All bytes follow from the source and
    the options, however often the build was interrupted.

    Args:
        source: a directory, a .tar or a .tar.gz; its pictures are ordered by a hash of their names.
        target: TFDS's data_dir.
        name: of the data set.
        held_out: the share of the pictures that makes the validation split, or another source that does.
        min_side: pictures whose shorter side is below this are left out, px.
        shard_mib: about the size of a shard, MiB.
        workers: threads.

    Returns:
        The directory of the data set.

    Raises:
        DataError: a source is missing, empty, no archive, or not the one that the data set was begun with.
        OutputError: the target cannot be written to, or has no room.
    """
    _check_options(name, held_out, min_side, shard_mib, workers)
    for path in (source, held_out) if isinstance(held_out, str) else (source,):
        if not Path(path).exists():
            raise DataError(f"{path} does not exist; expected a directory, a .tar or a .tar.gz of pictures")
    directory = Path(target) / name
    with writing(directory):
        try_out(epath.Path(directory))
    with (
        _only_build(directory),
        _scratch(directory) as scratch,
        # Without a name: a file of SQLite's own that goes with the connection.
        closing(sqlite3.connect("")) as database,
        ThreadPoolExecutor(workers) as pool,
    ):
        splits = _splits(database, source, held_out, scratch)
        final = directory / VERSION
        work = final if final.exists() else directory / f".{VERSION}.incomplete"
        shards = _plan(work, name, splits, min_side, shard_mib)
        read = tqdm(pool.map(_read_content, shards), "checksums", len(shards), unit=" shards")
        contents = dict(zip(shards, read, strict=True))
        missing = [shard for shard, content in contents.items() if content is None]
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are complete and match their checksums")
        _check_room(directory, missing)
        with tqdm(total=sum(len(shard.pictures) for shard in missing), unit=" pictures", desc="building") as bar:
            for shard in missing:
                contents[shard] = _write_shard(shard, min_side, pool, 4 * workers, bar)
        by_split = {split: [contents[shard] for shard in shards if shard.split == split] for split in splits}
        if missing or work != final:
            _write_metadata(work, name, by_split)
            with writing(final):
                work.rename(final)
    for split, parts in by_split.items():
        print(f"{split}: {_Content.total(parts)}, in {len(parts)} shards")
    print(f"{final}: read it with --data.source=tfds --data.path={name} --data.data_dir={target}")
    return final


def _check_options(name: str, held_out: float | str, min_side: int, shard_mib: float, workers: int) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise DataError(f"--name {name}: expected lower-case letters, digits and underscores, such as my_photos")
    if name in tfds.list_builders(with_community_datasets=False):
        raise DataError(f"--name {name} is a data set that TFDS itself knows how to make; choose another name")
    if not isinstance(held_out, str) and not 0 < held_out < 1:
        raise DataError(f"--held-out {held_out}: expected a share between 0 and 1, or name pictures with --eval")
    if min_side < 0:
        raise DataError(f"--min-side {min_side}: expected zero or more, px")
    if shard_mib <= 0:
        raise DataError(f"--shard-mib {shard_mib}: expected a positive number")
    if workers < 1:
        raise DataError(f"--workers {workers}: expected at least 1")


@contextmanager
def _only_build(directory: Path) -> Iterator[None]:
    """Holds a lock that the system lets go when the process ends, however it ends."""
    with writing(directory):
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another build is writing {directory}; wait for its end") from None
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A directory for unpacked archives; what a killed build left there is removed."""
    scratch = directory / ".unpacked"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Picture(NamedTuple):
    """Where a picture's bytes lie."""

    # Within the source.
    name: str
    # As bytes, because names of files need not be text.
    file: bytes
    offset: int
    size: int


class Pictures(Sequence[Picture]):
    """Pictures ordered by a hash of their names; they lie in a database, so that millions of them take no memory.

    Args:
        database: to put them in.
        files: what the source holds; what is no picture by its name is counted and left out.
        path: the source, for messages.

    Raises:
        DataError: there is no picture among the files.
    """

    def __init__(self, database: sqlite3.Connection, files: Iterable[Picture], path: str) -> None:
        columns = "name TEXT, file BLOB, offset INTEGER, size INTEGER"
        database.execute(f"CREATE TABLE listed (key INTEGER, {columns})")
        database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?)", self._keyed(files))
        database.execute(f"CREATE TABLE IF NOT EXISTS pictures (row INTEGER PRIMARY KEY, {columns})")
        (before,) = database.execute("SELECT COUNT(*) FROM pictures").fetchone()
        database.execute(
            "INSERT INTO pictures (name, file, offset, size) "
            "SELECT name, file, offset, size FROM listed ORDER BY key, name, file, offset"
        )
        database.execute("DROP TABLE listed")
        (after,) = database.execute("SELECT COUNT(*) FROM pictures").fetchone()
        self._database, self._rows = database, range(before + 1, after + 1)
        if not self._rows:
            raise DataError(
                f"{path} holds no pictures (found {self.others} other files); expected {', '.join(SUFFIXES)}"
            )

    def _keyed(self, files: Iterable[Picture]) -> Iterator[tuple]:
        self.others = 0
        for file in files:
            if is_picture(PurePosixPath(file.name)):
                digest = hashlib.blake2b(file.name.encode(), digest_size=8).digest()
                yield int.from_bytes(digest, "big", signed=True), *file
            else:
                self.others += 1

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """A picture, or for a slice those Pictures."""
        rows = self._rows[index]
        part = object.__new__(Pictures)
        part._database, part._rows = self._database, rows if isinstance(rows, range) else range(rows, rows + 1)
        return part if part._rows is rows else next(iter(part))

    def __iter__(self) -> Iterator[Picture]:
        columns = "SELECT name, file, offset, size FROM pictures WHERE row >= ? AND row < ? ORDER BY row"
        return map(Picture._make, self._database.execute(columns, (self._rows.start, self._rows.stop)))

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        total = "SELECT TOTAL(size) FROM pictures WHERE row >= ? AND row < ?"
        return int(self._database.execute(total, (self._rows.start, self._rows.stop)).fetchone()[0])

    def digest(self) -> str:
        """A hash of their names and sizes."""
        result = hashlib.sha256()
        for picture in self:
            result.update(f"{picture.name}\0{picture.size}\n".encode())
        return result.hexdigest()[:16]


def _splits(database: sqlite3.Connection, source: str, held_out: float | str, scratch: Path) -> dict[str, Pictures]:
    pictures = _list(database, source, scratch / "source.tar")
    if isinstance(held_out, str):
        return {"train": pictures, "validation": _list(database, held_out, scratch / "eval.tar")}
    count = max(1, round(held_out * len(pictures)))
    if count >= len(pictures):
        raise DataError(f"{source} holds too few pictures ({len(pictures)}) to hold any out; name those with --eval")
    return {"train": pictures[count:], "validation": pictures[:count]}


def _list(database: sqlite3.Connection, source: str, scratch: Path) -> Pictures:
    path = Path(source)
    try:
        files = _in_folder(path) if path.is_dir() else _in_archive(path, scratch)
        pictures = Pictures(database, tqdm(files, f"listing {path.name}", unit=" files"), source)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    except sqlite3.OperationalError as error:
        raise OutputError(
            f"the list of {source}'s pictures: {error}; SQLITE_TMPDIR names another place for it"
        ) from None
    others = f"; {pictures.others} other files are no pictures by their names and are left out"
    print(f"{source}: {len(pictures)} pictures{others if pictures.others else ''}")
    return pictures


def _in_folder(folder: Path) -> Iterator[Picture]:
    for file in visible_files(epath.Path(folder)):
        name = os.fsencode(file.relative_to(folder)).decode("utf-8", "backslashreplace")
        if file.suffix.lower() == ".tar":
            for picture in _in_tar(Path(file), file):
                yield picture._replace(name=f"{name}/{picture.name}")
        else:
            yield Picture(name, os.fsencode(file), 0, file.stat().length)


def _in_archive(archive: Path, scratch: Path) -> Iterator[Picture]:
    with archive.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    if compressed:
        _unpack(archive, scratch)
    return _in_tar(scratch if compressed else archive, archive)


def _in_tar(tar: Path, origin: Path) -> Iterator[Picture]:
    with tar.open("rb") as file:
        try:
            for name, offset, size in _members(file):
                yield Picture(name, os.fsencode(tar), offset, size)
        except tarfile.TarError as error:
            raise DataError(
                f"{origin} is no readable tar: {error}; expected a directory, a .tar or a .tar.gz of pictures"
            ) from None


def _unpack(archive: Path, target: Path) -> None:
    """Compressed pictures cannot be read in another order than the archive's."""
    with writing(target), archive.open("rb") as file, target.open("wb") as plain:
        counted = tqdm.wrapattr(file, "read", archive.stat().st_size, desc=f"unpacking {archive.name}")
        try:
            with counted as compressed, gzip.open(compressed) as unpacked:
                shutil.copyfileobj(unpacked, plain, 2**24)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{archive} is damaged: {error}") from None


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files in an uncompressed tar, and in the tars inside it."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            # tarfile keeps every header else.
            tar.members.clear()
            path = PurePosixPath(member.name)
            if not member.isreg() or is_hidden(path):
                continue
            name = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if name.lower().endswith(".tar"):
                for inner, offset, size in _members(tar.extractfile(member)):
                    yield f"{name}/{inner}", member.offset_data + offset, size
            else:
                yield name, member.offset_data, member.size
        # tarfile takes a damaged header for the end, where zeros should be.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")


@dataclass(frozen=True, eq=False)
class _Shard:
    split: str
    path: Path
    pictures: Pictures


class _Content(NamedTuple):
    """What is in a complete shard, and what was left out."""

    count: int
    size: int
    small: int
    corrupt: int

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> _Content:
        return cls(manifest["count"], manifest["bytes"], len(manifest["too small"]), len(manifest["corrupt"]))

    @classmethod
    def total(cls, parts: Sequence[_Content]) -> _Content:
        return cls(*map(sum, zip(*parts, strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.count} pictures, {self.size / 1e9:.3g} GB "
            f"({self.small} too small and {self.corrupt} corrupt ones left out)"
        )


def _plan(work: Path, name: str, splits: dict[str, Pictures], min_side: int, shard_mib: float) -> list[_Shard]:
    """The shards to write; raises DataError if others were begun in `work`."""
    plan: dict[str, Any] = {"minimum side": min_side}
    shards = []
    for split, pictures in splits.items():
        count = min(len(pictures), max(1, math.ceil(pictures.size / (shard_mib * 2**20))))
        plan |= {f"{split} pictures": len(pictures), f"{split} shards": count}
        plan[f"{split} names and sizes"] = pictures.digest()
        for i, path in enumerate(_template(work, name, split).sharded_filepaths(count)):
            part = pictures[i * len(pictures) // count : (i + 1) * len(pictures) // count]
            shards.append(_Shard(split, Path(path), part))
    file = work / MANIFESTS / "plan.json"
    if not file.exists():
        if (work / "dataset_info.json").exists():
            raise DataError(f"{work} holds a data set that another command made; choose another --name or target")
        _write_json(file, plan)
    begun = _read_json(file)
    changes = [f"{key} {begun.get(key)}, now {plan[key]}" for key in plan if begun.get(key) != plan[key]]
    if changes:
        raise DataError(
            f"{work} was begun with another source or other options ({'; '.join(changes)}); "
            f"use those again, choose another --name, or remove the directory"
        )
    return shards


def _template(work: Path, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(data_dir=work, dataset_name=name, split=split, filetype_suffix="array_record")


def _read_content(shard: _Shard) -> _Content | None:
    """None unless the shard is complete and as its manifest says."""
    if not _manifest(shard.path).exists():
        return None
    if damage := _damage(shard.path):
        tqdm.write(f"{damage}; it is written again", file=sys.stderr)
        return None
    return _Content.of(_read_json(_manifest(shard.path)))


def _manifest(shard: Path) -> Path:
    return shard.parent / MANIFESTS / f"{shard.name}.json"


def _damage(shard: Path) -> str | None:
    """What a complete shard lacks."""
    if not _manifest(shard).exists():
        return f"{_manifest(shard)} is missing"
    if not shard.exists():
        return f"{shard} is missing"
    if _sha256(shard) != _read_json(_manifest(shard))["sha256"]:
        return f"{shard} does not match its checksum"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(shard: Path) -> int:
    reader = ArrayRecordReader(str(shard))
    count = reader.num_records()
    reader.close()
    return count


def _check_room(directory: Path, shards: Sequence[_Shard]) -> None:
    needed, free = sum(shard.pictures.size for shard in shards), shutil.disk_usage(directory).free
    if needed > free:
        raise OutputError(
            f"{directory} has room for {free / 1e9:.1f} GB; the pictures take up to {needed / 1e9:.1f} GB"
        )


def _record(picture: Picture, min_side: int) -> bytes:
    """The serialised record; raises ImageError where the picture is to be left out."""
    try:
        with open(picture.file, "rb") as file:
            file.seek(picture.offset)
            data = file.read(picture.size)
    except OSError as error:
        raise DataError(f"{picture.name} cannot be read: {error}") from None
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
    return SERIALIZER.get_tf_example(example).SerializeToString(deterministic=True)


def _write_shard(shard: _Shard, min_side: int, pool: ThreadPoolExecutor, ahead: int, bar: tqdm) -> _Content:
    partial_file = shard.path.with_name(f".{shard.path.name}.partial")
    kept, small, corrupt = [], [], []
    size = 0
    try:
        # Grain wants groups of one record.
        writer = ArrayRecordWriter(str(partial_file), "group_size:1")
        for picture, future in in_order(pool, partial(_record, min_side=min_side), shard.pictures, ahead):
            bar.update()
            try:
                record = future.result()
            except TooSmallError:
                small.append(picture.name)
            except ImageError as error:
                corrupt.append(picture.name)
                tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                writer.write(record)
                kept.append(picture.name)
                size += len(record)
        writer.close()
    except RuntimeError as error:
        raise OutputError(f"{shard.path} cannot be written: {error}") from None
    if _records(partial_file) != len(kept):
        raise OutputError(f"{partial_file} holds {_records(partial_file)} records after {len(kept)} were written")
    manifest = {
        "sha256": _sha256(partial_file),
        "bytes": size,
        "count": len(kept),
        "pictures": kept,
        "too small": small,
        "corrupt": corrupt,
    }
    with writing(shard.path):
        partial_file.replace(shard.path)
    _write_json(_manifest(shard.path), manifest)
    return _Content.of(manifest)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _write_metadata(work: Path, name: str, by_split: dict[str, list[_Content]]) -> None:
    infos = []
    for split, parts in by_split.items():
        total = _Content.total(parts)
        if not total.count:
            raise DataError(f"nothing is left for the {split} split: {total}")
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[part.count for part in parts],
                num_bytes=total.size,
                filename_template=_template(work, name, split),
            )
        )
    with writing(work):
        tfds.folder_dataset.write_metadata(
            data_dir=work, features=FEATURES, split_infos=infos, version=VERSION, check_data=False
        )


def check(target: str, name: str, *, workers: int = 1) -> None:
    """Verifies a data set that `build` completed: files, checksums and counts, and that training can use every record.

    Raises:
        DataError: there is no such data set, or it is damaged; the message says where.
    """
    directory = Path(target) / name / VERSION
    if not (directory / MANIFESTS).is_dir() or not (directory / "dataset_info.json").exists():
        raise DataError(f"{directory} holds no complete data set of this command's; build it first")
    min_side = _read_json(directory / MANIFESTS / "plan.json")["minimum side"]
    splits = tfds.builder_from_directory(directory).info.splits
    shards = [Path(path) for split in splits.values() for path in split.filepaths]
    with ThreadPoolExecutor(workers) as pool:
        damages = [d for d in tqdm(pool.map(_damage, shards), "checksums", len(shards), unit=" shards") if d]
        for split in () if damages else splits:
            counts = [_read_json(_manifest(Path(path)))["count"] for path in splits[split].filepaths]
            if splits[split].shard_lengths != counts:
                damages.append(f"dataset_info.json counts other {split} pictures than the manifests")
                continue
            source = TFDS(DataConfig(source="tfds", path=name, data_dir=target), split)
            reads = in_order(pool, partial(_use, source, min_side), range(len(source)), 4 * workers)
            for _, future in tqdm(reads, f"reading {split}", len(source), unit=" pictures"):
                if damage := future.result():
                    damages.append(damage)
    if damages:
        raise DataError(
            f"{directory} is damaged: {'; '.join(damages[:10])}{'; ...' if len(damages) > 10 else ''}. "
            "The command that built it writes missing and damaged shards anew"
        )
    whole = ", ".join(
        f"{split} {info.num_examples} pictures in {info.num_shards} shards" for split, info in splits.items()
    )
    print(f"{directory} is whole: {whole}; checksums match, every picture decodes")


def _use(source: TFDS, min_side: int, index: int) -> str | None:
    """What is wrong with a record."""
    try:
        image = source.read(index)
    except ImageError as error:
        return str(error)
    return f"{source.name(index)}: its shorter side is below {min_side} px" if min(image.shape[:2]) < min_side else None


if __name__ == "__main__":
    # The former spelling of a command, for one release.
    from asymvq_jax.former import run

    run("commands.build_data")
