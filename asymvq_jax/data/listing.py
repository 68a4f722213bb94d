"""What a data set is built from: the pictures in a directory tree or in tar archives, in an order of their own."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import os
import posixpath
import shutil
import sqlite3
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from etils import epath
from tqdm import tqdm

from asymvq_jax.data.identity import name_key
from asymvq_jax.data.sources import SUFFIXES
from asymvq_jax.errors import DataError, OutputError
from asymvq_jax.files.addresses import bucket_errors, in_bucket
from asymvq_jax.files.folders import HIDDEN, NOT_A_FILE, UNREADABLE_FOLDER, Tally, list_folder, remote_sizes
from asymvq_jax.files.formats import HEAD, named_as_other, named_as_picture, picture_format
from asymvq_jax.files.outputs import writing

# How compressed files begin, and what reads them.
COMPRESSED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]
    b"BZh": bz2.open,
}
NOT_A_PICTURE = "not pictures"
LOST_LINK = "links to what is not a picture of the archive"


class Picture(NamedTuple):
    """Where a picture's bytes lie."""

    # Within the source.
    name: str
    # As bytes, because names of files need not be text.
    file: bytes
    offset: int
    size: int


class Link(NamedTuple):
    """Another name for a picture of the same source, as archives keep hard and symbolic links."""

    name: str
    target: str


class Pictures(Sequence[Picture]):
    """Pictures ordered by a hash of their names; they lie in a database, so that millions of them take no memory.

    Args:
        database: to put them in.
        files: what the source holds.
        path: the source, for messages.
        left_out: counts the links that lead to none of the pictures.

    Raises:
        DataError: none of the files is a picture.
    """

    def __init__(
        self, database: sqlite3.Connection, files: Iterable[Picture | Link], path: str, left_out: Tally
    ) -> None:
        columns = "name TEXT, file BLOB, offset INTEGER, size INTEGER"
        database.execute(f"CREATE TABLE listed (key INTEGER, {columns})")
        database.execute("CREATE TABLE links (name TEXT, target TEXT)")
        # One pass over the files, of which the links are few.
        database.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?)", self._keyed(database, files))
        self._follow_links(database, left_out)
        database.execute(f"CREATE TABLE IF NOT EXISTS pictures (row INTEGER PRIMARY KEY, {columns})")
        (before,) = database.execute("SELECT COUNT(*) FROM pictures").fetchone()
        database.execute(
            "INSERT INTO pictures (name, file, offset, size) "
            "SELECT name, file, offset, size FROM listed ORDER BY key, name, file, offset"
        )
        for table in ("listed", "links"):
            database.execute(f"DROP TABLE {table}")
        (after,) = database.execute("SELECT COUNT(*) FROM pictures").fetchone()
        self._database, self._rows = database, range(before + 1, after + 1)
        if not self._rows:
            raise DataError(
                f"{path} holds no pictures (found {left_out.counts[NOT_A_PICTURE]} other files); "
                f"expected {', '.join(SUFFIXES)}"
            )

    @staticmethod
    def _keyed(database: sqlite3.Connection, files: Iterable[Picture | Link]) -> Iterator[tuple[Any, ...]]:
        for file in files:
            if isinstance(file, Link):
                database.execute("INSERT INTO links VALUES (?, ?)", file)
            else:
                yield _signed(name_key(file.name)), *file

    @staticmethod
    def _follow_links(database: sqlite3.Connection, left_out: Tally) -> None:
        links = [Link(*row) for row in database.execute("SELECT name, target FROM links ORDER BY name")]
        if not links:
            return
        database.execute("CREATE INDEX by_name ON listed (name)")
        targets = {link.name: link.target for link in links}
        query = "SELECT file, offset, size FROM listed WHERE name = ? ORDER BY file, offset"
        for link in links:
            target, seen = link.target, set[str]()
            while target in targets and target not in seen:
                # A link to a link.
                seen.add(target)
                target = targets[target]
            found = database.execute(query, (target,)).fetchone()
            if found is None:
                left_out.add(LOST_LINK, link.name)
            else:
                row = (_signed(name_key(link.name)), link.name, *found)
                database.execute("INSERT INTO listed VALUES (?, ?, ?, ?, ?)", row)

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


def _signed(key: int) -> int:
    """The 64 bits as SQLite's integers have them."""
    return key - 2**64 if key >= 2**63 else key


def list_source(database: sqlite3.Connection, source: str, scratch: Path) -> Pictures:
    """Lists the pictures of a directory or a .tar (also .gz, .bz2), and prints what is left out, by reason.

    Args:
        database: to put the list in.
        source: the directory or archive, here or in a bucket (gs://...).
        scratch: where a compressed archive is unpacked to.

    Raises:
        DataError: the source cannot be read, is not an archive, or holds no picture.
        OutputError: there is no room for the list.
    """
    path, left_out = epath.Path(source), Tally()
    try:
        with bucket_errors(source):
            files = _in_folder(path, left_out) if path.is_dir() else _in_archive(path, scratch, left_out)
            pictures = Pictures(database, tqdm(files, f"listing {path.name}", unit=" files"), source, left_out)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from None
    except sqlite3.OperationalError as error:
        raise OutputError(
            f"the list of {source}'s pictures: {error}; SQLITE_TMPDIR names another place for it"
        ) from None
    rest = "; ".join(map(str, left_out.result()))
    print(f"{source}: {len(pictures)} pictures{f'; left out: {rest}' if rest else ''}")
    return pictures


def _text(name: str) -> str:
    """A file's name as text, which it need not be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _in_folder(folder: epath.Path, left_out: Tally) -> Iterator[Picture | Link]:
    listing = list_folder(folder, recursive=True)
    for each in listing.left_out:
        if each.reason.startswith(UNREADABLE_FOLDER):
            raise DataError(f"{folder}: {each}; make them readable, or move them elsewhere")
        left_out.include(each)
    sizes = remote_sizes(folder) if in_bucket(folder) else None
    for file in listing.pictures:
        name = _text(file.relative_to(listing.folder).as_posix())
        yield Picture(name, os.fsencode(file), 0, os.stat(file).st_size if sizes is None else sizes[str(file)])
    for file in listing.others:
        name = _text(file.relative_to(listing.folder).as_posix())
        if file.suffix.lower() == ".tar":
            for inner in _in_tar(file, file, left_out):
                yield _nested(name, inner)
        else:
            left_out.add(NOT_A_PICTURE, name)


def _in_archive(archive: epath.Path, scratch: Path, left_out: Tally) -> Iterator[Picture | Link]:
    with archive.open("rb") as file:
        head = file.read(8)
    if head.startswith((b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")):
        raise DataError(
            f"{archive} is an archive of a kind that is not read (zip, 7z, rar, zstd, xz): unpack it first, and name "
            "the folder"
        )
    reader = next((reader for beginning, reader in COMPRESSED.items() if head.startswith(beginning)), None)
    if reader is not None:
        _unpack(archive, scratch, reader)
    return _in_tar(epath.Path(scratch) if reader else archive, archive, left_out)


def _in_tar(tar: epath.Path, origin: epath.Path, left_out: Tally) -> Iterator[Picture | Link]:
    with tar.open("rb") as file:
        try:
            for found in _members(file, left_out):
                yield found if isinstance(found, Link) else found._replace(file=os.fsencode(tar))
        except tarfile.TarError as error:
            raise DataError(
                f"{origin} is not a readable tar: {error}; expected a directory, a .tar or a .tar.gz of pictures"
            ) from None


def _unpack(archive: epath.Path, target: Path, reader: Callable[[IO[bytes]], IO[bytes]]) -> None:
    """Compressed pictures cannot be read in another order than the archive's."""
    with writing(target), archive.open("rb") as file, target.open("wb") as plain:
        counted = tqdm.wrapattr(file, "read", archive.stat().length, desc=f"unpacking {archive.name}")
        try:
            with counted as compressed, reader(compressed) as unpacked:
                shutil.copyfileobj(unpacked, plain, 2**24)
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                # Of the disk, and not of the archive.
                raise
            raise DataError(f"{archive} is damaged: {error}") from None


def _nested(archive: str, inner: Picture | Link) -> Picture | Link:
    """What an archive inside the source holds, by its name within the source."""
    if isinstance(inner, Link):
        return Link(f"{archive}/{inner.name}", f"{archive}/{inner.target}")
    return inner._replace(name=f"{archive}/{inner.name}")


def _members(file: IO[bytes], left_out: Tally) -> Iterator[Picture | Link]:
    """The pictures and links in an uncompressed tar, and in the tars inside it; their file is still to be set."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            # tarfile keeps every header else.
            tar.members.clear()  # type: ignore[attr-defined]
            path = PurePosixPath(member.name)
            name = _text(str(path))
            if any(part.startswith(".") and part != ".." for part in path.parts):
                left_out.add(HIDDEN, name)
            elif member.islnk() or member.issym():
                # A symbolic link begins where it lies, a hard link at the archive's root.
                start = path.parent if member.issym() else PurePosixPath()
                yield Link(name, _text(posixpath.normpath(start / member.linkname)))
            elif not member.isreg():
                if not member.isdir():
                    left_out.add(NOT_A_FILE, name)
            elif path.suffix.lower() == ".tar":
                inside = tar.extractfile(member)
                assert inside is not None, "a regular member has bytes"
                for inner in _members(inside, left_out):
                    found = _nested(name, inner)
                    if isinstance(found, Picture):
                        found = found._replace(offset=member.offset_data + found.offset)
                    yield found
            elif _is_picture(path, file, member.offset_data):
                yield Picture(name, b"", member.offset_data, member.size)
            else:
                left_out.add(NOT_A_PICTURE, name)
        # tarfile takes a damaged header for the end, where zeros should be.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def _is_picture(path: PurePosixPath, file: IO[bytes], offset: int) -> bool:
    """As for the files of a folder: by the name, or by the first bytes where the name says nothing."""
    if named_as_picture(path) or named_as_other(path):
        return named_as_picture(path)
    file.seek(offset)
    return picture_format(file.read(HEAD)) is not None
