"""What a folder holds: the one rule for training, generation, evaluation and scores; local or on a bucket."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath

import fsspec
from etils import epath

from asymvq_jax.errors import DataError
from asymvq_jax.files.addresses import bucket_errors, check_address, in_bucket
from asymvq_jax.files.formats import HEAD, named_as_other, named_as_picture, picture_format

HIDDEN = "hidden (the name begins with a dot)"
BROKEN_LINK = "links that lead nowhere"
REPEATED = "links to folders that are listed already"
NOT_A_FILE = "neither files nor folders"
UNREADABLE_FOLDER = "folders that cannot be read"


@dataclass(frozen=True)
class LeftOut:
    """How many files were left out for one reason, and the first of them."""

    reason: str
    count: int
    example: str

    def __str__(self) -> str:
        return f"{self.count} {self.reason}, such as {self.example}"


@dataclass(frozen=True)
class Listing:
    """The files of a folder.

    Attributes:
        folder: as it was given.
        pictures: sorted by path; pictures by their names, or by their first bytes where the name says nothing.
        others: all other files that are visible, sorted by path.
        left_out: what was passed over, by reason.
    """

    folder: epath.Path
    pictures: tuple[epath.Path, ...]
    others: tuple[epath.Path, ...]
    left_out: tuple[LeftOut, ...]

    def describe_rest(self, used: Iterable[PurePath] = ()) -> str:
        """All that was not used, in one line for a log, or "" where there is nothing.

        Args:
            used: files of `others` that are of use to the caller, such as texts or latents.
        """
        taken = set(used)
        rest = [path for path in self.others if path not in taken]
        parts = [str(each) for each in self.left_out]
        if rest:
            endings = Counter(path.suffix.lower() or "no ending" for path in rest).most_common(4)
            kinds = ", ".join(f"{count} {ending}" for ending, count in endings)
            parts.append(f"{len(rest)} not pictures ({kinds}), such as {rest[0].name}")
        return f"{self.folder}: left out: {'; '.join(parts)}" if parts else ""


@dataclass
class Tally:
    """Counts what a listing leaves out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Counts `name` among those left out for `reason`."""
        self.counts[reason] += 1
        self.examples[reason] = min(name, self.examples.get(reason, name))

    def include(self, other: LeftOut) -> None:
        """Counts what another listing left out."""
        self.counts[other.reason] += other.count
        self.examples[other.reason] = min(other.example, self.examples.get(other.reason, other.example))

    def result(self) -> tuple[LeftOut, ...]:
        """What was counted, in the order of the reasons."""
        return tuple(LeftOut(reason, self.counts[reason], self.examples[reason]) for reason in sorted(self.counts))


def list_folder(folder: str | os.PathLike[str], label: str = "", *, recursive: bool = False) -> Listing:
    """Lists the files of a folder, in time that grows linearly with their number.

    Hidden files and folders (such as the ._name files that macOS leaves) are left out. Links are followed, each folder
    once. A file whose ending is neither a picture's nor that of a common other file is taken for what its first bytes
    say.

    Args:
        folder: a local path, or one that etils.epath knows (gs://...).
        label: how messages call it, such as "--folder"; the path follows.
        recursive: whether folders inside are listed too.

    Returns:
        The listing, which may be empty of pictures.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    check_address(os.fspath(folder), label.rstrip("="))
    root, tally = epath.Path(folder), Tally()
    pictures: list[epath.Path] = []
    others: list[epath.Path] = []
    name = f"{label} {folder}".strip() if not label.endswith("=") else f"{label}{os.fspath(folder)!r}"
    try:
        with bucket_errors(root):
            if not root.exists():
                raise DataError(f"{name} does not exist; expected a directory")
            if not root.is_dir():
                raise DataError(
                    f"{name} is a file; expected a directory" if root.is_file() else f"{name} is not a directory"
                )
            found = sorted((_remote if in_bucket(root) else _local)(str(root), recursive, tally))
        for path in map(epath.Path, found):
            try:
                (pictures if _is_picture(path) else others).append(path)
            except OSError as error:
                tally.add(f"files that cannot be read ({error.strerror or error})", path.name)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    return Listing(root, tuple(pictures), tuple(others), tally.result())


def _local(root: str, recursive: bool, tally: Tally) -> Iterator[str]:
    """Files under a local folder, in no order; links to folders come after all real ones, so that those are listed."""
    folders, seen = [root], set()
    links: list[str] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            tally.add(REPEATED, _relative(folder, root))
            continue
        seen.add((state.st_dev, state.st_ino))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise
            tally.add(f"{UNREADABLE_FOLDER} ({error.strerror})", _relative(folder, root))
            continue
        for entry in entries:
            name = _relative(entry.path, root)
            if entry.name.startswith("."):
                tally.add(HIDDEN, name)
            elif _is(entry, "is_dir"):
                if recursive:
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif _is(entry, "is_file"):
                yield entry.path
            else:
                tally.add(BROKEN_LINK if entry.is_symlink() else NOT_A_FILE, name)


def _is(entry: os.DirEntry[str], what: str) -> bool:
    """`entry.is_dir()` or `entry.is_file()`, which raise for a chain of links that never ends."""
    try:
        return bool(getattr(entry, what)())
    except OSError:
        return False


def _relative(path: str, root: str) -> str:
    return os.path.relpath(path, root) if path != root else path


def _remote(root: str, recursive: bool, tally: Tally) -> Iterator[str]:
    """Files under a folder of a bucket, in no order; it has no links, and one request lists a thousand of them."""
    scheme, _, folder = root.partition("://")
    bucket, folder = fsspec.filesystem(scheme), folder.rstrip("/")
    entries = bucket.find(folder, detail=True) if recursive else {e["name"]: e for e in bucket.ls(folder, detail=True)}
    for entry in entries.values():
        # Objects that stand for empty folders end with a slash.
        if entry["type"] != "file" or entry["name"].endswith("/"):
            continue
        inside = PurePosixPath(entry["name"]).relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            tally.add(HIDDEN, str(inside))
        else:
            yield f"{scheme}://{folder}/{inside}"


def remote_sizes(root: epath.Path) -> dict[str, int]:
    """Bytes of every file under a folder of a bucket, by its address; one request for a thousand of them."""
    scheme, _, folder = str(root).partition("://")
    with bucket_errors(root):
        found = fsspec.filesystem(scheme).find(folder, detail=True)
    return {f"{scheme}://{name}": int(entry["size"]) for name, entry in found.items()}


def _is_picture(path: epath.Path) -> bool:
    if named_as_picture(path) or named_as_other(path):
        return named_as_picture(path)
    with bucket_errors(path), path.open("rb") as stream:
        return picture_format(stream.read(HEAD)) is not None


def by_stem(paths: Iterable[epath.Path]) -> dict[str, epath.Path]:
    """Files by their names without the ending.

    Raises:
        DataError: two have the same; which of them is meant cannot be known.
    """
    found: dict[str, epath.Path] = {}
    for path in paths:
        if found.setdefault(path.stem, path) is not path:
            raise DataError(
                f"{found[path.stem]} and {PurePosixPath(path).name} have the same name but for the ending; "
                "remove or rename one of them"
            )
    return found
