"""Paths that are addresses of buckets, and the packages that they need."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from etils import epath

from asymvq_jax.errors import ConfigError, UnansweredError, UserError, first_line

# What etils.epath and TensorStore need for each kind of address.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
# The extra that brings it.
EXTRAS = {"gs": "gcs", "s3": "s3"}
# Where Orbax cannot keep checkpoints.
WITHOUT_CHECKPOINTS = ("s3",)
# What a service that does not answer is to the clients of buckets: their own classes, by name, for each has others; the
# statuses of its answers; and how messages of TensorStore begin.
_UNANSWERED = {"ClientConnectionError", "ConnectionError", "Timeout", "TimeoutError"}
_OVERLOADED = {429, *range(500, 600)}
_PREFIXES = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, such as gs://bucket/run, and not one of this machine."""
    return "://" in os.fspath(path)


def check_address(path: str, field: str = "") -> None:
    """Raises ConfigError for an address (gs://...) that cannot be served here; paths of this machine are all right.

    Args:
        path: a path or an address.
        field: how messages call it, such as "data.path", or an option, such as "--image".
    """
    scheme, address, _ = path.partition("://")
    if not address:
        return
    named = _named(path, field)
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ConfigError(f"{named}: expected a path of this machine, or an address that begins with {known}")
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{named} needs the package {package}; install it with: pip install {package}, "
            f"or in a clone -e '.[{EXTRAS[scheme]}]'"
        )
    # Else what TensorStore or another host writes is not seen, once its folder has been listed.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False


def check_checkpoint_address(path: str, field: str = "") -> None:
    """As `check_address`, for a checkpoint or a run, which cannot lie in every kind of bucket."""
    check_address(path, field)
    scheme, address, _ = path.partition("://")
    if address and scheme in WITHOUT_CHECKPOINTS:
        raise ConfigError(
            f"{_named(path, field)}: Orbax cannot keep checkpoints at {scheme}://; expected a path of this machine, "
            "which may be the mounted bucket, or one that begins with gs://"
        )


def is_unanswered(error: BaseException | None) -> bool:
    """Whether an error comes of a service that does not answer, so that it may help to ask again later."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _UNANSWERED or getattr(error, "code", None) in _OVERLOADED or str(error).startswith(_PREFIXES):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_answered(error: Exception, place: str) -> None:
    """Raises UnansweredError, which names the place, for an error of a service that does not answer."""
    if is_unanswered(error):
        raise UnansweredError(f"{place}: the service does not answer: {first_line(error)}") from error


@contextmanager
def bucket_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what the client of a bucket raises, of many types, becomes an OSError, as file systems raise them.

    Raises:
        UnansweredError: the service did not answer, so that nothing is known of what lies there.
    """
    check_address(os.fspath(path))
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        check_answered(error, os.fspath(path))
        # Of a refusal's text the first line says which address, the others what the service answered.
        raise OSError(first_line(error)) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; of one in a bucket by one request, where epath's way takes four."""
    if not in_bucket(path):
        return bytes(epath.Path(path).read_bytes())
    system, name = fsspec.core.url_to_fs(os.fspath(path))
    return bytes(system.cat_file(name))


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; in a bucket file by file, for there they have no folders."""
    if in_bucket(source):
        with bucket_errors(source):
            fsspec.filesystem(str(source).partition("://")[0]).mv(str(source), str(target), recursive=True)
        return
    target.parent.mkdir(exist_ok=True)
    source.rename(target)


def check_local(path: str, field: str = "", instead: str = "copy it here first") -> None:
    """Raises ConfigError for an address, where only a path of this machine can be used; `field` as `check_address`."""
    if in_bucket(path):
        raise ConfigError(f"{_named(path, field)} is in a bucket; expected a path of this machine: {instead}")


def _named(path: str, field: str) -> str:
    if not field:
        return path
    return f"{field} {path}" if field.startswith("--") else f"{field}={path!r}"
