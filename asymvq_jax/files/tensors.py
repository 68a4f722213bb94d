"""Files that hold one array of numbers, such as a latent: .npy, .npz, .safetensors, ComfyUI's .latent, torch's .pt."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from etils import epath

from asymvq_jax.errors import InputError
from asymvq_jax.files.addresses import bucket_errors
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.formats import HEAD, picture_format

# In the order in which one is looked for beside a picture.
SUFFIXES = (".npy", ".npz", ".safetensors", ".latent", ".pt", ".pth")
# What ComfyUI writes since it stores latents without the scaling factor.
_COMFY, _COMFY_UNSCALED = "latent_tensor", "latent_format_version_0"
_NAMES = ("latent", "latents", "latent_tensor", "samples", "z", "x")


@dataclass(frozen=True)
class LatentFile:
    """An array and what its file says about it.

    Attributes:
        values: as stored, finite or not, of real numbers.
        scaled: whether it is times the scaling factor; None where the file does not say.
        kind: of the file, for messages.
    """

    values: Array
    scaled: bool | None
    kind: str


def read_latent_file(path: str | epath.Path) -> LatentFile:
    """Reads the one array of a file, whose kind is told by its content.

    Raises:
        InputError: the file is missing, damaged, or of another kind, or holds several arrays or none of real numbers.
    """
    try:
        with bucket_errors(path):
            data = epath.Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"latent {path} cannot be read: {reason}") from None
    scaled = None
    try:
        kind, arrays = _arrays(data)
        if _COMFY in arrays:
            kind, scaled = "ComfyUI latent", _COMFY_UNSCALED not in arrays
            arrays = {_COMFY: arrays[_COMFY]}
        values = _one(arrays)
    except InputError as error:
        raise InputError(f"latent {path} {error}") from None
    return LatentFile(values, scaled, kind)


def _arrays(data: bytes) -> tuple[str, Mapping[str, object]]:
    """The kind of a file and what it holds by name."""
    if not data:
        raise InputError("is empty; save it again as .npy with numpy.save")
    if data.startswith(b"\x93NUMPY"):
        return ".npy", {"": _load_numpy(data)}
    if data.startswith(b"PK"):
        with _opened_zip(data) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return "torch file", _load_torch(data)
        loaded = _load_numpy(data)
        assert isinstance(loaded, dict)
        return ".npz", loaded
    if len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return ".safetensors", _load_safetensors(data)
    if data[:1] == b"\x80":
        return "torch file", _load_torch(data)
    if kind := picture_format(data[:HEAD]):
        raise InputError(f"is a picture ({kind}), not a latent")
    raise InputError("is of no known kind; save it as .npy with numpy.save (or .npz, .safetensors, .pt)")


def _opened_zip(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise InputError(f"is a damaged archive: {error}; save it again as .npy with numpy.save") from None


def _load_numpy(data: bytes) -> object:
    """An array, or a dictionary of them."""
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    # What is raised for damaged files depends on the version and on the place.
    except Exception as error:
        if "pickle" in str(error).lower():
            raise InputError("holds Python objects, not an array of real numbers") from None
        raise InputError(f"is damaged: {error}; save it again as .npy with numpy.save") from None


def _load_safetensors(data: bytes) -> Mapping[str, object]:
    # Their own reader into NumPy does not know bfloat16, which this package brings.
    import ml_dtypes
    import safetensors

    types = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    try:
        found = safetensors.deserialize(data)
    except Exception as error:
        raise InputError(f"is a damaged .safetensors file: {error}; save it again as .npy with numpy.save") from None
    return {
        name: np.frombuffer(tensor["data"], types[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in found
        if tensor["dtype"] in types
    }


def _load_torch(data: bytes) -> Mapping[str, object]:
    try:
        import torch
    except ImportError:
        raise InputError(
            "is a torch file, which takes PyTorch to read; save it as .npy instead: numpy.save(path, tensor.numpy())"
        ) from None
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Torch raises whatever its unpickler trips over, in words about turning the protection off.
    except (Exception, pickle.UnpicklingError):
        raise InputError(
            "is a damaged torch file, or one of more than tensors; save it as .npy: numpy.save(path, tensor.numpy())"
        ) from None
    found = loaded if isinstance(loaded, dict) else {"": loaded}
    return {
        str(name): value.detach().float().numpy() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in found.items()
    }


def _one(arrays: Mapping[str, object]) -> Array:
    """The one array that can be a latent: by its name where there are several."""
    numbers = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
    named = [name for name in _NAMES if name in numbers]
    if not numbers:
        raise InputError("holds no array; expected one of real numbers, as numpy.save writes .npy files")
    if len(numbers) > 1 and len(named) != 1:
        shown = ", ".join(f"{name} {value.shape}" for name, value in list(numbers.items())[:5])
        raise InputError(f"holds {len(numbers)} arrays ({shown}): expected one; save it alone as .npy with numpy.save")
    value = numbers[named[0]] if len(numbers) > 1 else next(iter(numbers.values()))
    if value.dtype.kind not in "fiu" and str(value.dtype) != "bfloat16":
        raise InputError(f"holds values of type {value.dtype}: expected real numbers")
    return value.astype(np.float32) if value.dtype.kind not in "fiu" or value.dtype == np.float16 else value
