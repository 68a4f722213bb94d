"""Tensors in files: safetensors without torch, pickled checkpoints with it, and never any code from a file."""

from __future__ import annotations

import itertools
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import load_file
from safetensors.numpy import save_file

from asymvq_jax.errors import TensorFileError

PICKLES = (".ckpt", ".pth", ".pt", ".bin")


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a .safetensors file, or of a pickled .ckpt, .pth, .pt or .bin file, as float32.

    Raises:
        TensorFileError: the file is missing, of another kind, broken, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise TensorFileError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            tensors = {name: np.asarray(value) for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise TensorFileError(f"{path} is no safetensors file, or a truncated one: {error}") from None
    elif path.suffix in PICKLES:
        tensors = _read_pickle(path)
    else:
        raise TensorFileError(f"{path}: expected a name that ends in .safetensors, {', '.join(PICKLES)}")
    return {name: _float32(value) for name, value in tensors.items()}


def read_shapes(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of a .safetensors file's tensors, as float32, from its head alone.

    Raises:
        TensorFileError: the file is missing or broken.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {n: jax.ShapeDtypeStruct(file.get_slice(n).get_shape(), np.float32) for n in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TensorFileError(f"{path} is no safetensors file, or a truncated one: {error}") from None


def _float32(value: np.ndarray) -> np.ndarray:
    # Half precision widens exactly. Integers (step counters) are left alone.
    return value.astype(np.float32) if value.dtype.name in ("float16", "bfloat16", "float64") else value


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise TensorFileError(
            f"{path} is a PyTorch pickle, which only torch reads: pip install torch, or convert it to .safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load it all the same.
        if "Unsupported operand" in str(error):
            raise TensorFileError(f"{path} is no PyTorch checkpoint") from None
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TensorFileError(
            f"{path} holds more than tensors, such as code that would run on loading, and is refused"
            f"{f' (it names {named[1]})' if named else ''}; get it as .safetensors, or from another source"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # torch's longer words are about its own insides.
        reason = str(error).split(". ")[0] if isinstance(error, RuntimeError | OSError) else type(error).__name__
        raise TensorFileError(f"{path} is no PyTorch checkpoint, or a truncated one ({reason})") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise TensorFileError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise TensorFileError(f"{path} holds no tensors")
    return {name: value.to(torch.float32).numpy() if value.is_floating_point() else value.numpy()
            for name, value in tensors.items()}  # fmt: skip


# Endings of a Hugging Face folder's weights, and of the list of their shards; half precision is called a variant.
WEIGHT_SUFFIXES = {
    ".safetensors": ".safetensors.index.json",
    ".fp16.safetensors": ".safetensors.index.fp16.json",
    ".bin": ".bin.index.json",
    ".fp16.bin": ".bin.index.fp16.json",
}


def weight_files(folder: Path, *stems: str) -> list[Path]:
    """The files of a Hugging Face folder's weights: whole, of half precision, or in shards; safetensors before pickles.

    Args:
        folder: the folder.
        stems: what their names may begin with.

    Raises:
        TensorFileError: there are none, or shards are missing.
    """
    for (suffix, index), stem in itertools.product(WEIGHT_SUFFIXES.items(), stems):
        if (file := folder / (stem + index)).is_file():
            mapped = read_json(file).get("weight_map")
            shards = [folder / name for name in sorted(set(mapped.values()))] if isinstance(mapped, dict) else []
            if absent := [shard.name for shard in shards if not shard.is_file()]:
                raise TensorFileError(f"{file} names files that are not there: {', '.join(absent)}")
            return shards
        if (folder / (stem + suffix)).is_file():
            return [folder / (stem + suffix)]
    raise TensorFileError(f"{folder} has a config.json but no {stems[0]}.safetensors")


def read_folder(folder: Path, *stems: str) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face folder, as `read_tensors` reads them, from the files that `weight_files` finds."""
    return {name: value for file in weight_files(folder, *stems) for name, value in read_tensors(file).items()}


def misfits(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with `tensors`, a line each, where `expected` has the name and shape of every one."""
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    unexpected = [f"unexpected: {name} {value.shape}" for name, value in tensors.items() if name not in expected]
    misshapen = [
        f"misshapen: {name} {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + unexpected + misshapen


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, or a .ckpt as torch.save({"state_dict": ...}), which needs torch."""
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path, metadata={"format": "pt"})
        return
    try:
        import torch
    except ImportError:
        raise TensorFileError(f"{path}: writing a pickle needs torch; name a .safetensors file instead") from None
    torch.save({"state_dict": {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}}, path)


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        TensorFileError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TensorFileError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise TensorFileError(f"{path}: expected a JSON object")
    return content
