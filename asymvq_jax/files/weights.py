"""Weights in files: what each holds before any of it is read, folders of them, and targets written whole or not."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from asymvq_jax.errors import OutputError, TensorFileError
from asymvq_jax.files import pickles, safe_tensors
from asymvq_jax.files.addresses import check_local
from asymvq_jax.files.kinds import kind_of
from asymvq_jax.files.outputs import try_out
from asymvq_jax.files.stored import Table

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
# Parts of names that wrappers of a model add: DistributedDataParallel, torch.compile, FSDP, DeepSpeed, checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
# What dictionaries of tensors are called in a training's file.
CONTAINERS = ("state_dict", "model_state_dict", "model", "params", "params_ema", "net", "weights", "ema")


@dataclass(frozen=True)
class Weights:
    """What a weights file holds, or a folder's files together; no tensor has been read."""

    path: Path
    tensors: Table
    # Of safetensors its metadata; of a pickle the numbers and texts beside the tensors.
    metadata: Mapping[str, str]


def open_weights(path: str | Path) -> Weights:
    """Looks into a weights file, safetensors or PyTorch's; its first bytes decide which, not its name.

    Names are without what wrappers of the model add to them.

    Raises:
        TensorFileError: the file is missing, no weights file, damaged, or a pickle that would run code; the message
            says what it is and what to do.
    """
    check_local(str(path))
    path = Path(path)
    try:
        tensors, metadata = safe_tensors.read_head(path) if kind_of(path) == "safetensors" else pickles.read(path)
    except OSError as error:
        raise TensorFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if not tensors:
        raise TensorFileError(f"{path} holds no tensors; expected a model's weights")
    return Weights(path, unwrapped(tensors, path), metadata)


def unwrapped(tensors: Table, path: Path) -> Table:
    """The tensors without the parts of their names that wrappers add.

    Raises:
        TensorFileError: two have the same name then.
    """
    result: Table = {}
    for name, tensor in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
        if bare in result:
            raise TensorFileError(f"{path} holds two tensors {bare}, of which one has a wrapper's name before it")
        result[bare] = tensor
    return result


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a weights file, those with floating-point numbers as float32.

    Of a training's checkpoint, the ones of its state_dict (or what else it calls the model's), by their names there.

    Raises:
        TensorFileError: as `open_weights`.
    """
    tensors = open_weights(path).tensors
    for container in CONTAINERS:
        if inside := {n.removeprefix(f"{container}."): x for n, x in tensors.items() if n.startswith(f"{container}.")}:
            tensors = inside
            break
    return {name: tensor.read() for name, tensor in tensors.items()}


def weight_files(folder: Path, *stems: str) -> list[Path]:
    """The files of a Hugging Face folder's weights, whole or in shards.

    Safetensors go before pickles, plain files before variants. A variant's name is between: model.fp16.safetensors,
    diffusion_pytorch_model.non_ema.bin.

    Args:
        folder: the folder.
        stems: what their names may begin with.

    Raises:
        TensorFileError: there are none, shards are missing, or there are several variants and nothing else.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            index = re.compile(rf"{re.escape(stem)}{re.escape(suffix)}\.index(\.\w+)?\.json|"
                               rf"{re.escape(stem)}\.\w+{re.escape(suffix)}\.index\.json")  # fmt: skip
            whole = re.compile(rf"{re.escape(stem)}(\.\w+)?{re.escape(suffix)}")
            # Plain ones have the shorter names; fp16 goes before other variants.
            found = sorted((n for n in names if whole.fullmatch(n)), key=lambda n: (len(n), "fp16" not in n))
            indexes = sorted((n for n in names if index.fullmatch(n)), key=len)
            plain = [n for n in (f"{stem}{suffix}.index.json", f"{stem}{suffix}") if n in names]
            if chosen := [*plain, *indexes, *_only_variant(folder, found)][:1]:
                return _shards(folder / chosen[0]) if chosen[0].endswith(".json") else [folder / chosen[0]]
            if numbered := _numbered(folder, names, stem, suffix):
                return numbered
    readable = [name for name in names if name.endswith(SUFFIXES)]
    there = readable or [name for name in names if name.endswith((".msgpack", ".h5", ".onnx"))]
    what = "to read one of them, name the file" if readable else "no weights of a kind that is read"
    raise TensorFileError(
        f"{folder} has a config.json but no {stems[0]}.safetensors"
        + (f"; there is {', '.join(there)}: {what}" if there else "")
    )


def _numbered(folder: Path, names: Iterable[str], stem: str, suffix: str) -> list[Path]:
    """The shards of an index that is not there, all of them by their numbers."""
    form = re.compile(rf"{re.escape(stem)}(\.\w+)?-(\d+)-of-(\d+){re.escape(suffix)}")
    found = [match for name in names if (match := form.fullmatch(name))]
    if not found:
        return []
    wanted = {(found[0][1], i, int(found[0][3])) for i in range(1, int(found[0][3]) + 1)}
    if absent := wanted - {(match[1], int(match[2]), int(match[3])) for match in found}:
        raise TensorFileError(
            f"{folder} holds {len(wanted) - len(absent)} of {len(wanted)} shards, such as {found[0][0]}: "
            "download the others as well"
        )
    return [folder / match[0] for match in found if match[1] == found[0][1]]


def _only_variant(folder: Path, found: list[str]) -> list[str]:
    """Of several variants the one whose numbers are the model's: fp16 and bf16 are, an average may not be."""
    rounded = [name for name in found if re.search(r"\.(fp16|bf16|fp32)\.", name)]
    if len(found) > 1 and not rounded:
        raise TensorFileError(f"{folder} holds several variants: {', '.join(found)}; keep the one that is wanted")
    return [*rounded, *found]


def _shards(index: Path) -> list[Path]:
    mapped = read_json(index).get("weight_map")
    names = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
    if not names:
        raise TensorFileError(f"{index} has no weight_map, which says in which file each tensor is")
    shards = [index.parent / name for name in names]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise TensorFileError(f"{index} names files that are not there: {', '.join(absent)}")
    return shards


def open_folder(folder: Path, *stems: str) -> Weights:
    """Looks into a Hugging Face folder's weights, in the files that `weight_files` finds."""
    files = [open_weights(path) for path in weight_files(folder, *stems)]
    tensors: Table = {}
    for file in files:
        if twice := tensors.keys() & file.tensors.keys():
            raise TensorFileError(f"{file.path} and another shard both hold {min(twice)}")
        tensors |= file.tensors
    return Weights(files[0].path if len(files) == 1 else folder, tensors, files[0].metadata)


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    integers: Collection[str] = (),
    **beside: float,
) -> None:
    """Writes float32 tensors one at a time, to a .safetensors file, or a .ckpt as torch.save({"state_dict": ...}).

    Args:
        path: the file.
        tensors: names and values, in the order of `shapes`.
        shapes: of all of them.
        integers: names of those that a .safetensors file holds as int64.
        beside: numbers for the file's metadata, or beside the state_dict.
    """
    if path.suffix == ".safetensors":
        safe_tensors.write(path, tensors, shapes, integers, **{name: repr(value) for name, value in beside.items()})
    else:
        pickles.write(path, tensors, shapes, **beside)


def check_target(target: Path) -> None:
    """For a check before long work: makes the directory that `target` is to be in, and tries it out.

    Raises:
        OutputError: something is there already, or nothing can be written there.
    """
    try:
        if target.exists() or target.is_symlink():
            raise OutputError(f"{target} exists already; choose another target or remove it first")
        try_out(epath.Path(target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None


def check_space(target: Path, needed: int) -> None:
    """Raises OutputError where the disk of `target` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(
            f"{target} cannot be written: no space left on the device, which has {free / 1e6:.1f} MB free where "
            f"{needed / 1e6:.1f} MB are needed"
        )


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a path beside `target`, and renames it when all is written.

    Raises:
        OutputError: it cannot be written; nothing is left of it.
    """
    beside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        write(beside / target.name)
        os.rename(beside / target.name, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        TensorFileError: the file is missing or no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith("version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer: run `git lfs pull` in the clone")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise TensorFileError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise TensorFileError(f"{path}: expected a JSON object")
    return content
