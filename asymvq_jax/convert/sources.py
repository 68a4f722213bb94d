"""What a user names as a source of weights: a path here, or an address or a hub's id, which have to be downloaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from asymvq_jax.errors import ConvertError

log = logging.getLogger(__name__)

# Buckets that JAX checkpoints are read from.
BUCKETS = ("gs", "s3")


def in_bucket(source: str | Path) -> bool:
    """Whether `source` is in a bucket, such as gs://bucket/run.

    Raises:
        ConvertError: an address of another kind.
    """
    scheme, separator, _ = str(source).partition("://")
    if separator and scheme.lower() not in BUCKETS:
        raise ConvertError(
            f"{source} is a URL, and nothing is downloaded here: download it first, and name the file or folder"
        )
    return bool(separator)


def locate(source: str | Path) -> Path:
    """The file or folder that a user means; of a model's folder in the Hugging Face hub's cache, its snapshot.

    Raises:
        ConvertError: an address, the id of a model on the hub, a cache without or with several snapshots.
    """
    if in_bucket(source):
        raise ConvertError(
            f"{source} is in a bucket, from which only JAX checkpoints can be read: copy it to this machine first"
        )
    path = Path(source).expanduser()
    if not path.exists():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)) and not path.parent.exists():
            raise ConvertError(
                f"no checkpoint at {source}. If that is a model's id on the Hugging Face hub, download it first: "
                f"hf download {source} --local-dir FOLDER"
            )
        return path
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    main = path / "refs" / "main"
    named = snapshots / main.read_text().strip() if main.is_file() else None
    chosen = named if named in found else found[0] if len(found) == 1 else None
    if chosen is None:
        raise ConvertError(
            f"{path} is a model in the Hugging Face hub's cache, with {len(found)} snapshots; name one of them: "
            + ", ".join(map(str, found[:5]))
        )
    log.info("%s is a model in the Hugging Face hub's cache: its snapshot is %s", path, chosen)
    return chosen
