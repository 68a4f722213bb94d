"""Files that commands write: their place is checked before the work, and they are replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Collection

from etils import epath

from asymvq_jax.config import UserError


class OutputError(UserError):
    """A place that cannot be written to; the message names the path and the reason."""


def check_writable(path: str | epath.Path, suffixes: Collection[str]) -> None:
    """Raises OutputError unless `path` is a file's name with one of `suffixes`, in a directory that is or can be made.

    Makes that directory, and tries it out.
    """
    file = epath.Path(path)
    if file.suffix.lower() not in suffixes:
        raise OutputError(f"{path}: expected a name that ends in one of {', '.join(suffixes)}")
    if file.is_dir():
        raise OutputError(f"{path} is a directory; name a file")
    probe = file.with_name(f".{file.name}.writable")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from None


def write_bytes(path: str | epath.Path, data: bytes) -> None:
    """Writes a file, replacing one of that name only once the new one is complete.

    Raises:
        OutputError: the file cannot be written; an older one is as it was.
    """
    file = epath.Path(path)
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}") from None
