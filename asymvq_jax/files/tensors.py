"""Files that hold one array of numbers, such as a latent: .npy, .npz, .safetensors, ComfyUI's .latent, torch's .pt."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from etils import epath

from asymvq_jax.errors import InputError, TensorFileError
from asymvq_jax.files import pickles, safe_tensors
from asymvq_jax.files.addresses import bucket_errors, read_bytes
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.kinds import kind_of
from asymvq_jax.files.stored import StoredTensor

# How a .npy file begins.
NUMPY = b"\x93NUMPY"
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
        layout: where its channels are; None where the file does not say.
    """

    values: Array
    scaled: bool | None
    kind: str
    layout: Literal["channels-first"] | None = None


def read_latent_file(path: str | epath.Path) -> LatentFile:
    """Reads the one array of a file, whose kind is found from its content.

    Raises:
        InputError: the file is missing, damaged, or of another kind, or holds several arrays or none of real numbers.
    """
    if "://" not in str(path):
        return _read(Path(path), str(path))
    try:
        with bucket_errors(path):
            data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise InputError(f"latent {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decode_latent_file(data, str(path))


def decode_latent_file(data: bytes, name: str) -> LatentFile:
    """As `read_latent_file`, of a file's bytes; messages call it `name`."""
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(data)
        copy.flush()
        return _read(Path(copy.name), name)


def _read(path: Path, name: str) -> LatentFile:
    """A local file, which messages call `name`."""
    scaled: bool | None = None
    layout: Literal["channels-first"] | None = None
    try:
        kind, arrays = _arrays(path)
        if _COMFY in arrays:
            kind, scaled, layout = "ComfyUI latent", _COMFY_UNSCALED not in arrays, "channels-first"
            arrays = {_COMFY: arrays[_COMFY]}
        return LatentFile(_one(arrays), scaled, kind, layout)
    except TensorFileError as error:
        raise InputError(f"latent {str(error).replace(str(path), name)}; or save it as .npy with numpy.save") from None
    except InputError as error:
        raise InputError(f"latent {name} {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"latent {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def is_plain(data: bytes) -> bool:
    """Whether a file is of a kind that takes no more memory than its bytes, and no unpickling: .npy or safetensors."""
    return data.startswith(NUMPY) or (
        len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data)
    )


def _arrays(path: Path) -> tuple[str, Mapping[str, Array | StoredTensor]]:
    """The kind of a file and what it holds by name."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise InputError("is empty; save it again as .npy with numpy.save")
    npz = head.startswith(b"PK") and _is_npz(path)
    if npz or head.startswith(NUMPY):
        loaded = read_numpy(path)
        return (".npz", loaded) if isinstance(loaded, dict) else (".npy", {"": loaded})
    if kind := picture_format(head):
        raise InputError(f"is a picture ({kind}), not a latent")
    if kind_of(path) == "safetensors":
        return ".safetensors", safe_tensors.read_head(path)[0]
    return "torch file", pickles.read(path)[0]


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise InputError(f"is a damaged archive: {error}; save it again as .npy with numpy.save") from None


def read_numpy(file: Path | BinaryIO) -> Array | dict[str, Array]:
    """The array of a .npy file, or those of an .npz by name.

    Raises:
        InputError: it is damaged, or holds Python objects; the message begins with a verb.
    """
    try:
        loaded = np.load(file, allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    # What is raised for damaged files depends on the version and on the place.
    except Exception as error:
        why = f"{error}; save it again as .npy with numpy.save"
        if "pickle" in str(error).lower():
            why = "it holds Python objects; expected real numbers"
        raise InputError(f"is not a readable NumPy array: {why}") from None


def _one(arrays: Mapping[str, Array | StoredTensor]) -> Array:
    """The one array that can be a latent: by its name where there are several."""
    named = [name for name in arrays if name.rpartition(".")[2] in _NAMES]
    if not arrays:
        raise InputError("holds no array; expected one of real numbers, as numpy.save writes .npy files")
    if len(arrays) > 1 and len(named) != 1:
        shown = ", ".join(f"{name} {value.shape}" for name, value in list(arrays.items())[:5])
        raise InputError(f"holds {len(arrays)} arrays ({shown}): expected one; save the latent alone")
    chosen = arrays[named[0]] if len(arrays) > 1 else next(iter(arrays.values()))
    value: Array = chosen.read() if isinstance(chosen, StoredTensor) else chosen
    if value.dtype.kind not in "fiu":
        # NumPy's files have no name for it.
        hint = " (bfloat16, probably: save float32 instead)" if value.dtype.str == "|V2" else ""
        raise InputError(f"holds values of type {value.dtype}{hint}: expected real numbers")
    return value.astype(np.float32) if value.dtype == np.float16 else value
