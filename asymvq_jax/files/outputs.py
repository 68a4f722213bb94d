"""Files that commands write: their place is checked before the work, and they are replaced whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from etils import epath

from asymvq_jax.errors import OutputError, first_line
from asymvq_jax.files.addresses import bucket_errors, in_bucket


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of the file system, or of a bucket, inside into an OutputError that names `path`."""
    try:
        with bucket_errors(path):
            yield
    except OSError as error:
        reason = explained(error, path)
        raise OutputError(f"{path} cannot be written: {reason}") from None


def explained(error: OSError, path: str | os.PathLike[str]) -> str:
    """What an error in writing says; of a bucket's, whose text may be an address alone, in words."""
    if not in_bucket(path):
        return str(error)
    missing = "no such bucket, or nothing of that name: " if isinstance(error, FileNotFoundError) else ""
    return f"{missing}{first_line(error)}"


def try_out(directory: epath.Path) -> None:
    """Makes a directory and writes a file there, which it removes; raises OSError where that is not possible."""
    probe = directory / ".writable"
    with bucket_errors(directory):
        # Buckets have no directories, and must not be made by mistake.
        if not in_bucket(directory):
            directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        # Another process may have removed it.
        probe.unlink(missing_ok=True)


def check_name(path: str | epath.Path, suffixes: Collection[str]) -> None:
    """Raises OutputError unless `path` is a file's name that ends in one of `suffixes`."""
    file = epath.Path(path)
    if file.suffix.lower() not in suffixes:
        raise OutputError(f"{path}: expected a name that ends in one of {', '.join(suffixes)}")
    with writing(path):
        is_directory = file.is_dir()
    if is_directory:
        raise OutputError(f"{path} is a directory; name a file")


def check_writable(path: str | epath.Path, suffixes: Collection[str]) -> None:
    """As `check_name`; makes the directory and tries it out as well, for a check before long work."""
    check_name(path, suffixes)
    with writing(path):
        try_out(epath.Path(path).parent)


def check_not_input(option: str, out: str | epath.Path, inputs: Mapping[str, str | epath.Path | None]) -> None:
    """Raises OutputError where an output would overwrite an input.

    Args:
        option: what names the output.
        out: the output.
        inputs: the inputs by the options that name them.
    """
    for name, path in inputs.items():
        if path is not None and _same(epath.Path(out), epath.Path(path)):
            raise OutputError(f"{option} {out} is the file of {name}, which would be overwritten; name another file")


def _same(a: epath.Path, b: epath.Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return bool(a.resolve() == b.resolve())


def write_bytes(path: str | epath.Path, data: bytes) -> None:
    """Writes a file, replacing one of that name only once the new one is complete.

    Raises:
        OutputError: the file cannot be written; an older one is as it was.
    """
    file = epath.Path(path)
    if in_bucket(path):
        # An object appears once all of it has arrived.
        with writing(path):
            file.write_bytes(data)
        return
    # Another process may be writing the same file.
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
