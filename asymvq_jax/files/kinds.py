"""What a file is by its first bytes, not by its name; and what to do about those that hold no weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from asymvq_jax.errors import TensorFileError

Kind = Literal["safetensors", "pickle"]
# Beginnings of files that people take for weights, with what they are and what to do about it.
OTHERS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, three lines of text in place of the weights: run `git lfs pull` in the clone",
    ),
    (
        rb"(?i)\s*(<!doctype|<html|<head|<\?xml|<error)",
        "is a web page, and not the weights that its address should have led to: sign in or accept the model's terms, "
        "and download it again",
    ),
    (rb"GGUF", "is a GGUF file (quantised, for llama.cpp and its kin): get the model as .safetensors"),
    (rb"\x89HDF\r\n", "is an HDF5 file (Keras): get the model as .safetensors"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "is a compressed archive: unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "is a picture"),
    (rb"%PDF", "is a PDF document"),
    (rb"\x93NUMPY", "is one NumPy array (.npy): weights are many tensors, as .safetensors or a PyTorch checkpoint"),
    # A map of 1 to 15 or of more entries, whose first key is a text.
    (
        rb"([\x81-\x8f]|\xde..|\xdf....)([\xa1-\xbf]|\xd9.)[\w.]",
        "is a Flax file (msgpack): get the model as .safetensors, or save it from diffusers or transformers by "
        "from_pretrained(FOLDER, from_flax=True).save_pretrained(TARGET)",
    ),
    (
        rb"\s*\{\s*\"error\"",
        "is a server's error message, and not the weights: sign in or accept the model's terms, and download it again",
    ),
    (
        rb"\s*[{\[]",
        "is a JSON file, a description and not the weights: name the folder that it is in, or the weights file",
    ),
    # Field 1 of ONNX's model is its version, and field 2 the program that wrote it.
    (
        rb"\x08[\x01-\x1f]\x12.[\w.]|\x08[\x01-\x1f]:",
        "is an ONNX program, and not weights alone: get the model that it was exported from as .safetensors",
    ),
    (rb"\x00{64}", "begins with zeros only, as a download does that was interrupted: download it again"),
)


def kind_of(path: Path) -> Kind:
    """The kind of a weights file.

    Raises:
        TensorFileError: there is no such file, it cannot be read, or it holds no weights; the message says what it is
            and what to do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise TensorFileError(f"no weights file at {path}") from None
    except OSError as error:
        raise TensorFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if not head:
        raise TensorFileError(f"{path} is empty (0 bytes): download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    # A zip file, a pickle of protocol 2 to 5, and one of protocol 0 or 1 that begins with a dictionary.
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]|\(dp|\}q|ccollections", head):
        return "pickle"
    for beginning, what in OTHERS:
        if re.match(beginning, head, re.DOTALL):
            raise TensorFileError(f"{path} {what}")
    if head[257:262] == b"ustar":
        if re.match(rb"(\./)?(sys_info|pickle|storages|tensors)\x00", head):
            raise TensorFileError(
                f"{path} is a file of PyTorch's before 0.1.10: save it again, torch.save(torch.load(OLD), NEW)"
            )
        raise TensorFileError(f"{path} is a tar archive: unpack it first")
    if len(head) < 1024 and re.fullmatch(rb"[\t\n\r -~]+", head):
        shown = head.decode().strip().partition("\n")[0][:80]
        wanted = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise TensorFileError(f"{path} is not a {wanted}, but a text ({shown!r}): download it again")
    if path.suffix == ".safetensors":
        raise TensorFileError(f"{path} is not a safetensors file, or a damaged one")
    raise TensorFileError(f"{path} is not a PyTorch checkpoint, and not a safetensors file either")


def name_archive(names: Collection[str]) -> str:
    """What a zip file without a PyTorch checkpoint is."""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "is a NumPy archive (.npz); write its arrays as .safetensors: "
            "safetensors.numpy.save_file(dict(numpy.load(OLD)), NEW)"
        )
    if any(name.endswith(("models/model.json", "serialized_exported_program.json")) for name in names):
        return "is a program of torch.export, and not weights alone; save the model's state_dict() by torch.save"
    return "is a zip archive without a PyTorch checkpoint in it; unpack it first"
