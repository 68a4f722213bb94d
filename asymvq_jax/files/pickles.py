"""PyTorch's files without PyTorch, and without ever running what they name.

A pickle is a program that may call anything. Here every name in it stands for an inert object of ours: calling it,
giving it attributes or filling it does nothing but keep what was given. Only tensors, storages and NumPy's arrays mean
something, and they are described and not read. So checkpoints with callbacks, options and whole modules in them are
read, with or without the packages that they came from, and a name that an attack would call is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from asymvq_jax.errors import TensorFileError
from asymvq_jax.files.kinds import name_archive
from asymvq_jax.files.stored import DTYPES, StoredTensor, known_dtype, read_slice

# The first of the pickles in a file of torch's before 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Untyped": "uint8",
}  # fmt: skip
# torch's other names of types.
ALIASES = {"half": "float16", "float": "float32", "double": "float64", "int": "int32", "long": "int64"}
# Modules of Python itself from which data are built; any other of them that is called is not there for data.
PLAIN = {
    "argparse", "array", "_codecs", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "functools", "itertools", "logging", "numbers", "pathlib", "random", "re", "string", "threading", "_thread",
    "time", "typing", "uuid", "weakref", "zoneinfo", "__main__",
}  # fmt: skip
PLAIN_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "super", "tuple", "type",
}  # fmt: skip
# NumPy's functions that its own arrays, numbers and generators are built by.
PLAIN_NUMPY = ("numpy.core", "numpy._core", "numpy.random", "numpy.dtype", "numpy.ndarray", "numpy.ma")


class CodeError(TensorFileError):
    """A pickle that calls something other than data; the message names it."""


class Inert:
    """Stands for an object of any class: takes everything, does nothing."""

    source = ""

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        _refuse_calls(cls.source)
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = {}
        return made

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments: tuple[Any, ...] = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Does nothing, as do the others by which pickles fill an object."""

    extend = add = update = append


class _Dict(dict[Any, Any]):
    """Stands for collections' dictionaries, with any arguments."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(a for a in arguments if isinstance(a, list | dict)))

    def __setstate__(self, state: Any) -> None:
        """Attributes of a dictionary, such as a state_dict's versions, mean nothing here."""


def _refuse_calls(source: str) -> None:
    """Raises CodeError for what data are never made of."""
    module, _, name = source.rpartition(".")
    root = module.partition(".")[0]
    if root == "builtins":
        refused = name not in PLAIN_BUILTINS and not name.endswith(("Error", "Exception", "Warning"))
    elif root == "numpy":
        refused = name[:1].islower() and not source.startswith(PLAIN_NUMPY)
    else:
        refused = root in sys.stdlib_module_names and root not in PLAIN and source != "types.SimpleNamespace"
    if refused:
        raise CodeError(source)


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, by its key there."""

    key: str
    dtype: str
    count: int
    # Where it begins in the storage `key`, for the views in old files.
    start: int = 0


class _StorageType(Inert):
    dtype = ""


class _DType(Inert):
    """NumPy's dtype, as its constructor and its state describe it."""

    def numpy(self) -> np.dtype | None:
        """None unless it is one of plain numbers."""
        code = str(self.arguments[0]) if self.arguments else ""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        big = order in (">", b">")
        if len(code) < 2 or code[0] not in "fiub" or not code[1:].isdigit():
            return None
        try:
            return np.dtype(code).newbyteorder(">" if big else "<")
        except TypeError:
            return None


class _Array(Inert):
    """NumPy's ndarray, whose state has the shape, the type, the order and the bytes."""

    def tensor(self) -> StoredTensor | None:
        """None unless it is an array of plain numbers."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, fortran, data = self.state
        kind = dtype.numpy() if isinstance(dtype, _DType) else None
        if kind is None or not isinstance(data, bytes) or not _is_shape(shape):
            return None
        if len(data) != math.prod(shape) * kind.itemsize or kind.newbyteorder("=").name not in DTYPES:
            return None

        def load() -> np.ndarray:
            values = np.frombuffer(data, kind).astype(kind.newbyteorder("="))
            return values.reshape(shape, order="F" if fortran else "C")

        return StoredTensor(tuple(shape), kind.newbyteorder("=").name, load)


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)


class _Reader(pickle.Unpickler):
    """Unpickles with inert objects under every name; `load_storage` gives a storage's numbers."""

    def __init__(
        self, data: bytes, load_storage: Callable[[Storage, int, int], np.ndarray], storages: dict[str, str]
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._load_storage = load_storage
        # The type of each storage that the pickle names, which old files do not say elsewhere.
        self._storages = storages
        self._known: dict[str, Any] = {
            "collections.OrderedDict": _Dict,
            "collections.defaultdict": _Dict,
            "collections.Counter": _Dict,
            "builtins.set": set,
            "builtins.frozenset": frozenset,
            "_codecs.encode": _encode,
            "copyreg._reconstructor": _reconstruct,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch.storage._load_from_bytes": _nested,
            "torch.nn.parameter.Parameter": _first,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._utils._rebuild_xla_tensor": _first,
            "torch._utils._rebuild_device_tensor_from_numpy": _first,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
            "torch._tensor._rebuild_from_type": _from_type,
            "torch._tensor._rebuild_from_type_v2": _from_type,
            "numpy.dtype": _DType,
            "numpy.ndarray": _Array,
            **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
            **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
        }

    def find_class(self, module: str, name: str) -> Any:
        # Protocols up to 2 call Python's own modules as Python 2 did.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        source = f"{module}.{name}"
        if source in self._known:
            return self._known[source]
        known = name.removesuffix("Storage") if module in ("torch", "torch.cuda", "torch.storage") else ""
        if known != name and known in STORAGES:
            made: Any = type(name, (_StorageType,), {"source": source, "dtype": STORAGES[known]})
        elif module == "torch" and ALIASES.get(name, name) in DTYPES:
            made = ALIASES.get(name, name)
        else:
            made = type(name.rpartition(".")[2] or "Object", (Inert,), {"source": source})
        self._known[source] = made
        return made

    def persistent_load(self, pid: Any) -> Storage:
        """Raises UnpicklingError for anything but a storage."""
        match pid:
            case ("storage" | b"storage", kind, key, _, count, *view) if type(count) is int and count >= 0:
                dtype = getattr(kind, "dtype", "") or getattr(kind, "source", "")
                start, count = (view[0][1], view[0][2]) if view and view[0] else (0, count)
                self._storages.setdefault(str(key), dtype)
                return Storage(str(key), dtype, count, start)
        raise pickle.UnpicklingError("it refers to an external object that is not a storage")

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Any:
        """A dense tensor. Others (sparse, quantised) stay inert."""
        numbers = (offset, *shape, *stride) if isinstance(shape, tuple) and isinstance(stride, tuple) else (None,)
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor has no storage or no shape")
        dtype, count = storage.dtype, storage.count
        # The newest form keeps bytes, and says of what type they are.
        if len(more) > 2 and isinstance(more[2], str) and more[2] != dtype:
            dtype = more[2]
            count = count // DTYPES[dtype].itemsize if dtype in DTYPES else count
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else -1
        if last >= count:
            raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its storage")
        run = Storage(storage.key, dtype, count, storage.start)

        def load() -> np.ndarray:
            if last < 0:
                return np.zeros(shape, DTYPES.get(dtype, np.float32))
            values = self._load_storage(run, offset, last + 1 - offset)
            steps = [step * values.itemsize for step in stride]
            # Without a copy where the numbers lie in order.
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, shape, steps))

        return StoredTensor(shape, dtype, load)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _nested(*arguments: Any) -> None:
    raise pickle.UnpicklingError("its tensors were written by pickle.dump; write them by torch.save")


def _from_type(function: Callable[..., Any], kind: Any, arguments: tuple[Any, ...], *state: Any) -> Any:
    """A subclass of a tensor; `function` is one of ours, as everything in a pickle."""
    return function(*arguments)


def _array(kind: Any, *rest: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *rest: Any) -> _Array:
    made = _Array()
    made.state = (1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytes | bytearray) else data)
    return made


def _encode(text: str, *encoding: str) -> bytes:
    return text.encode("latin1")


def _reconstruct(kind: Any, *rest: Any) -> Any:
    return kind() if isinstance(kind, type) and issubclass(kind, Inert | dict | set) else Inert()


def read(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a PyTorch file by their path in it ("state_dict.encoder.conv_in.weight"), none of them read.

    Args:
        path: a zip file as torch.save writes it, a file of torch's before 1.6, or a plain pickle.

    Returns:
        The tensors, and the plain numbers and texts that stand beside them at the top.

    Raises:
        CodeError: it calls something other than data; nothing has been called.
        TensorFileError: it is damaged, truncated, or of another kind.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped and not zipfile.is_zipfile(path):
            raise TensorFileError(f"{path} is truncated: it is a zip archive without its end; download it again")
        content = _read_zip(path) if zipped else _read_pickles(path)
        return _collect(content)
    except CodeError as error:
        raise CodeError(
            f"{path} holds more than tensors, such as code that would run on loading, and is refused (it names "
            f"{error}); get it as .safetensors, or from another source"
        ) from None
    except OSError as error:
        raise TensorFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except TensorFileError:
        raise
    # A damaged pickle is a program of anything: it fails as any program may.
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise TensorFileError(f"{path} is not a PyTorch checkpoint, or a damaged or truncated one ({reason})") from None


def _unpickle(data: bytes, load: Callable[[Storage, int, int], np.ndarray], storages: dict[str, str]) -> Any:
    for operation, argument, _ in pickletools.genops(data):
        # The index of a memory that would be allocated up to there.
        if operation.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("its memory is numbered beyond its length")
    return _Reader(data, load, storages).load()


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        main = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if main is None:
            raise TensorFileError(f"{path} {name_archive(entries)}")
        root = main.removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise TensorFileError(
                f"{path} is a TorchScript program, and not weights alone; save its state_dict() by torch.save"
            )
        order = ">" if entries.get(f"{root}byteorder") and archive.read(f"{root}byteorder") == b"big" else "<"
        data = archive.read(main)

    def load(storage: Storage, offset: int, count: int) -> np.ndarray:
        dtype, name = known_dtype(storage.dtype, path), f"{root}data/{storage.key}"
        if name not in entries:
            raise TensorFileError(f"{path} is damaged: {name} is not in it")
        entry = entries[name]
        begin, length = offset * dtype.itemsize, count * dtype.itemsize
        if entry.file_size < begin + length:
            raise TensorFileError(f"{path} is damaged: {name} has {entry.file_size} bytes, fewer than its tensor")
        if entry.compress_type == zipfile.ZIP_STORED:
            values = read_slice(path, dtype, _data_offset(path, entry) + begin, count)
        else:
            values = np.frombuffer(_decompressed(path, entry)[begin : begin + length], dtype)
        return values if order == "<" else values.view(f"u{dtype.itemsize}").byteswap().view(dtype)

    return _unpickle(data, load, {})


def _decompressed(path: Path, entry: zipfile.ZipInfo) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(entry)
    # The library raises what its decompressors do.
    except Exception as error:
        raise TensorFileError(f"{path} is damaged: {entry.filename} cannot be unpacked ({error})") from None


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, after its own head, whose lengths may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise TensorFileError(f"{path} is damaged: {entry.filename} has no head")
    names, extra = struct.unpack("<HH", head[26:30])
    return int(entry.header_offset + 30 + names + extra)


def _read_pickles(path: Path) -> Any:
    """A plain pickle; or torch's old form: three of them, the content, the storages' keys, and then their numbers."""
    size = path.stat().st_size
    places: dict[str, int] = {}

    def load(storage: Storage, offset: int, count: int) -> np.ndarray:
        dtype = known_dtype(storage.dtype, path)
        if storage.key not in places:
            raise TensorFileError(f"{path} is truncated: storage {storage.key} is not in it")
        return read_slice(path, dtype, places[storage.key] + (storage.start + offset) * dtype.itemsize, count)

    storages: dict[str, str] = {}
    with path.open("rb") as file:
        first = _unpickle(_next_pickle(file), load, {})
        if first != LEGACY_MAGIC:
            return first
        for _ in ("version", "system"):
            _next_pickle(file)
        content = _unpickle(_next_pickle(file), load, storages)
        for key in _unpickle(_next_pickle(file), load, {}):
            head = file.read(8)
            dtype = known_dtype(storages.get(str(key), ""), path)
            places[str(key)] = file.tell()
            end = file.tell() + int.from_bytes(head, "little") * dtype.itemsize
            if len(head) < 8 or end > size:
                raise TensorFileError(f"{path} is truncated: it ends within its tensors; download it again")
            file.seek(end)
    return content


def _next_pickle(file: IO[bytes]) -> bytes:
    begin = file.tell()
    for _ in pickletools.genops(file):
        pass
    length = file.tell() - begin
    file.seek(begin)
    return file.read(length)


def _collect(content: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    tensors: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    # Not by recursion, which a nested file could exhaust.
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, _Array):
            value = value.tensor()
        if isinstance(value, StoredTensor):
            tensors[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in reversed([*_children(value)])]
    plain = {
        str(key): str(value)
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, str | int | float)
    }
    return tensors, plain


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), child) for key, child in value.items() if isinstance(key, str | int))
    elif isinstance(value, list | tuple):
        yield from ((str(i), child) for i, child in enumerate(value))
    elif isinstance(value, Inert):
        state = value.state
        if isinstance(state, Mapping) and "_modules" in state:
            # A whole module, whose names are those of its state_dict().
            for part in ("_parameters", "_buffers", "_modules"):
                yield from _children(state.get(part))
        else:
            # What is made of its arguments has no state.
            yield from _children(state or value.arguments)


# How pickles begin a text, a name, and a tensor; see `write`.
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
_REST = b"\x89ccollections\nOrderedDict\n)RtR"


def write(path: Path, tensors: Iterable[tuple[str, np.ndarray]], shapes: Mapping[str, tuple[int, ...]], **beside: float
          ) -> None:  # fmt: skip
    """Writes what torch.save({"state_dict": {...}, **beside}) would of float32 tensors, one at a time.

    Args:
        path: the file.
        tensors: names and values, in the order of `shapes`.
        shapes: of all of them.
        beside: numbers beside the state_dict.
    """

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value: float) -> bytes:
        return b"J" + struct.pack("<i", value) if isinstance(value, int) else b"G" + struct.pack(">d", value)

    def sizes(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    program = b"\x80\x02}(" + text("state_dict") + b"}("
    for i, (name, shape) in enumerate(shapes.items()):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = text(str(i)) + text("cpu") + number(math.prod(shape)) + b"tQ"
        program += text(name) + _TENSOR + storage + b"K\x00" + sizes(shape) + sizes(strides) + _REST
    program += b"u" + b"".join(text(name) + number(value) for name, value in beside.items()) + b"u."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for i, (_, value) in enumerate(tensors):
            with archive.open(f"archive/data/{i}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(value, "<f4").data)
        archive.writestr("archive/version", "3\n")
