"""Files that commands write: their place is checked before the work, and they are replaced whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from etils import epath

from asymvq_jax.errors import OutputError


@contextmanager
def writing(path: str | epath.Path) -> Iterator[None]:
    """Turns an error of the file system inside into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from None


def try_out(directory: epath.Path) -> None:
    """Makes a directory and writes a file there, which it removes; raises OSError where that is not possible."""
    probe = directory / ".writable"
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    # Another process may have removed it.
    probe.unlink(missing_ok=True)


def check_name(path: str | epath.Path, suffixes: Collection[str]) -> None:
    """Raises OutputError unless `path` is a file's name that ends in one of `suffixes`."""
    file = epath.Path(path)
    if file.suffix.lower() not in suffixes:
        raise OutputError(f"{path}: expected a name that ends in one of {', '.join(suffixes)}")
    if file.is_dir():
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
