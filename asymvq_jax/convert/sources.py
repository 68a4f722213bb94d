"""What a user names as a source of weights: a path here, or an address or a hub's id, which have to be downloaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from asymvq_jax.config.loading import published
from asymvq_jax.errors import ConvertError
from asymvq_jax.files.weights import SUFFIXES

log = logging.getLogger(__name__)

# Buckets that JAX checkpoints are read from.
BUCKETS = ("gs", "s3")
# Files that say what the weights beside them are.
DESCRIPTIONS = ("config.json", "model_index.json")
# What trainers write beside a model.
NOT_MODELS = ("optimizer", "scheduler", "scaler", "random_states", "training_args", "rng_state")


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


def _shortened(source: str | Path) -> str:
    text = str(source)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-20:]}"


def locate(source: str | Path) -> Path:
    """The file or folder that a user means; of a model's folder in the Hugging Face hub's cache, its snapshot.

    Raises:
        ConvertError: an address, the id of a model on the hub, a cache without or with several snapshots.
    """
    if in_bucket(source):
        raise ConvertError(
            f"{source} is in a bucket, from which only JAX checkpoints can be read: copy it to this machine first"
        )
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # A name that is too long, a folder that may not be entered, a home directory that is not known.
        raise ConvertError(
            f"{_shortened(source)} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not there:
        if command := _published_command(str(source)):
            raise ConvertError(f"no checkpoint at {source}: write it with: {command}, or name another")
        hub = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[\w.-]+)*)", str(source))
        if hub and not Path(path.parts[0]).exists():
            raise ConvertError(
                f"no checkpoint at {source}. If that is a model's id on the Hugging Face hub, download it first: "
                f"hf download {hub[1]} --local-dir FOLDER" + (f", and name FOLDER{hub[2]}" if hub[2] else "")
            )
        return path
    if path.is_file() and (path.name in DESCRIPTIONS or path.name.endswith(".index.json")):
        log.info("%s describes the folder that it is in, which is read", path)
        return path.parent
    if not path.is_file() and not path.is_dir():
        raise ConvertError(f"{path} is neither a file nor a folder")
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


def _published_command(source: str) -> str:
    """The command that writes the weights which a published configuration begins with; empty for other paths."""
    pattern = re.compile(rf"asymvq convert --checkpoint \S+ --out {re.escape(source)}$", re.MULTILINE)
    found = (pattern.search(path.read_text()) for path in published().values())
    return next((match[0] for match in found if match), "")


def describe_folder(path: Path) -> str:
    """What a folder without a model that is read is, and what to name instead; empty where that is not known."""
    files = sorted(p.relative_to(path) for p in [*path.glob("*"), *path.glob("*/*")] if p.is_file())
    names = {file.name for file in files}
    if any(name.endswith(".distcp") for name in names):
        return (
            "it is a checkpoint of torch.distributed: write it as one file by python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    if parts := [file for file in files if re.fullmatch(r"mp_rank_\d+_model_states\.pt", file.name)]:
        return (
            f"it is a checkpoint of DeepSpeed: name {path / parts[0]}, or after ZeRO stage 3 write it as one file by "
            "its zero_to_fp32.py"
        )
    if {"data.pkl", "version"} <= names:
        return f"it is an unpacked PyTorch file: pack it again by (cd {path.parent} && zip -0r FILE.pt {path.name})"
    weights = [file for file in files if file.suffix in SUFFIXES and not file.name.startswith(NOT_MODELS)]
    return f"did you mean {path / weights[0]}?" if weights else ""
