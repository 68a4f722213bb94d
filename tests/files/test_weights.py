"""Weights files: what they are by content, pickles whose code never runs, only what is wanted is read, damaged ones."""

import argparse
import builtins
import collections
import importlib
import json
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from fuzzing import TIMES, tell
from safetensors.numpy import load_file, save_file

from asymvq_jax.errors import OutputError, TensorFileError
from asymvq_jax.files import pickles, stored
from asymvq_jax.files.weights import (
    check_space,
    open_weights,
    read_tensors,
    weight_files,
    write_atomically,
    write_tensors,
)

TORCH = {
    "a": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(20.0).reshape(4, 5).T,
    "half": torch.linspace(-3, 3, 7).half(),
    "brain": torch.linspace(-3, 3, 7).bfloat16(),
    "eight": torch.linspace(-3, 3, 8).to(torch.float8_e4m3fn),
    "double": torch.linspace(0, 1, 5, dtype=torch.float64),
    "counts": torch.arange(5),
    "number": torch.tensor(2.5),
    "view": torch.arange(10.0)[3:7],
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "none": torch.zeros(0, 3),
}


def numbers(tensor):
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_pickles_are_read_as_torch_reads_them(zipped, tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"epoch": 3, "state_dict": TORCH}, path, _use_new_zipfile_serialization=zipped)
    opened = open_weights(path)
    assert opened.metadata == {"epoch": "3"}
    for name, expected in TORCH.items():
        got = opened.tensors[f"state_dict.{name}"]
        assert got.shape == tuple(expected.shape)
        np.testing.assert_array_equal(got.read(), numbers(expected), err_msg=name)
    assert set(read_tensors(path)) == set(TORCH)


def test_a_compressed_archive_and_one_of_a_large_endian_machine(tmp_path):
    torch.save({"x": TORCH["a"], "h": TORCH["half"]}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as before, zipfile.ZipFile(tmp_path / "y.pt", "w") as after:
        for entry in before.infolist():
            data = before.read(entry)
            if entry.filename.endswith("byteorder"):
                data = b"big"
            if "/data/" in entry.filename:
                width = 4 if len(data) == 48 else 2
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            after.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
    tensors = read_tensors(tmp_path / "y.pt")
    np.testing.assert_array_equal(tensors["x"], numbers(TORCH["a"]))
    np.testing.assert_array_equal(tensors["h"], numbers(TORCH["half"]))


def stranger(module, name, base=object, **fields):
    """An object of a class of a package that is not there when the file is read."""
    parent = ""
    for part in module.split("."):
        parent = f"{parent}.{part}".lstrip(".")
        sys.modules.setdefault(parent, types.ModuleType(parent))
    kind = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, kind)
    made = kind()
    made.__dict__.update(fields)
    return made


def test_what_trainers_leave_in_their_files_is_passed_over(tmp_path):
    options = stranger("trainer_options.config", "Options", dict, parent=None)
    options["rate"] = 1e-4
    callback = stranger("trainer_lightning.callbacks", "Checkpoint", best=torch.ones(()))
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 1)))
    content = {
        "state_dict": collections.OrderedDict(x=TORCH["a"]),
        "callbacks": {type(callback): {"best": np.float64(0.25)}, "list": [callback, {1, 2}, frozenset("ab")]},
        "hyper_parameters": argparse.Namespace(out=pathlib.Path("runs"), options=options, when=complex(1, 2)),
        "history": np.arange(6, dtype=">f4").reshape(2, 3),
        "counts": collections.defaultdict(list, a=[1]),
        "ema": module,
        "reference": os.path.join,
    }
    torch.save(content, tmp_path / "x.ckpt")
    for name in [n for n in sys.modules if n.startswith("trainer_")]:
        del sys.modules[name]
    tensors = open_weights(tmp_path / "x.ckpt").tensors
    np.testing.assert_array_equal(tensors["state_dict.x"].read(), numbers(TORCH["a"]))
    np.testing.assert_array_equal(tensors["history"].read(), np.arange(6).reshape(2, 3))
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(tensors[f"ema.{name}"].read(), value.numpy())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_arrays(protocol, tmp_path):
    arrays = {"x": np.arange(6, dtype=np.float16).reshape(2, 3), "y": np.asfortranarray(np.ones((2, 3))), "s": "text"}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays, protocol))
    tensors = read_tensors(tmp_path / "x.pkl")
    np.testing.assert_array_equal(tensors["x"], arrays["x"])
    np.testing.assert_array_equal(tensors["y"], arrays["y"])


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "mkdir": lambda trace: Call(os.mkdir, trace),
    "shell": lambda trace: Call(os.system, f"mkdir {trace}"),
    "eval": lambda trace: Call(eval, f"__import__('os').mkdir({trace!r})"),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({trace!r})"),
    "process": lambda trace: Call(subprocess.Popen, ["mkdir", trace]),
    "open": lambda trace: Call(builtins.open, trace, "w"),
    "getattr": lambda trace: Call(getattr, str, "format"),
    "import": lambda trace: Call(importlib.import_module, "this"),
    "numpy": lambda trace: Call(np.savetxt, trace, [1.0]),
    "method": lambda trace: Call(operator.methodcaller, "touch"),
    "path": lambda trace: Call(os.makedirs, trace),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("form", ["zip", "before 1.6", "plain"])
def test_code_in_a_pickle_is_refused_and_never_run(attack, form, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "x.safetensors"
    content = {"state_dict": {"x": TORCH["a"]}, "extra": [ATTACKS[attack](str(trace))]}
    if form == "plain":
        path.write_bytes(pickle.dumps({"extra": content["extra"]}, 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(TensorFileError, match=r"holds more than tensors, such as code that would run.*it names"):
        open_weights(path)
    assert not trace.exists()


def test_a_call_hidden_behind_harmless_names_does_nothing(tmp_path):
    """functools.partial of a function, and a class of a package: both only stand for something here."""
    trace = tmp_path / "ran"

    class Hidden:
        def __reduce__(self):
            import functools

            return functools.partial, (os.mkdir, str(trace))

    torch.save({"x": TORCH["a"], "hook": Hidden()}, tmp_path / "x.pt")
    assert set(open_weights(tmp_path / "x.pt").tensors) == {"x"}
    assert not trace.exists()


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    torch.save({"x": torch.ones(10, 10), "y": torch.ones(1000)}, tmp_path / "x.pt")
    save_file({"x": np.ones((10, 10), np.float32), "y": np.ones(1000, np.float32)}, tmp_path / "x.safetensors")
    read = []
    whole = stored.read_slice

    def spy(path, dtype, offset, count):
        read.append(count)
        return whole(path, dtype, offset, count)

    monkeypatch.setattr("asymvq_jax.files.pickles.read_slice", spy)
    monkeypatch.setattr("asymvq_jax.files.safe_tensors.read_slice", spy)
    for name in ("x.pt", "x.safetensors"):
        opened = open_weights(tmp_path / name)
        assert not read
        opened.tensors["x"].read()
        assert read == [100]
        read.clear()


def save_with_types(path, tensors):
    """A safetensors file of any types: name -> (type, array)."""
    head, data = {}, b""
    for name, (kind, x) in tensors.items():
        head[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_of_any_type(tmp_path):
    values = np.linspace(-4, 4, 9, dtype=np.float32)
    kinds = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BF16": ml_dtypes.bfloat16}
    tensors = {kind: (kind, values.astype(dtype)) for kind, dtype in kinds.items()}
    tensors["new"] = ("F4_E2M1", np.zeros(9, np.uint8))
    save_with_types(tmp_path / "x.safetensors", tensors)
    opened = open_weights(tmp_path / "x.safetensors").tensors
    for kind, dtype in kinds.items():
        got = opened[kind].read()
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, values.astype(dtype).astype(np.float32))
    with pytest.raises(TensorFileError, match="type F4_E2M1 is wanted, which is not supported"):
        opened["new"].read()


def test_what_we_write_is_read_by_others_and_by_us(tmp_path):
    values = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.float32(7).reshape(())}
    shapes = {name: x.shape for name, x in values.items()}
    for name in ("x.safetensors", "x.ckpt"):
        write_tensors(tmp_path / name, values.items(), shapes, scaling_factor=0.125, norm_groups=32)
        opened = open_weights(tmp_path / name)
        assert {n: opened.metadata[n] for n in ("scaling_factor", "norm_groups")} == {
            "scaling_factor": "0.125",
            "norm_groups": "32",
        }
        for key, x in read_tensors(tmp_path / name).items():
            np.testing.assert_array_equal(x, values[key])
    theirs = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert theirs["scaling_factor"] == 0.125
    for key, x in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(x, values[key])
        np.testing.assert_array_equal(theirs["state_dict"][key].numpy(), values[key])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        (b"  <!DOCTYPE html><html>", "is a web page"),
        (b"GGUF\x03\x00", "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x1f\x8b\x08\x00", "is a compressed archive: unpack it first"),
        (b"\x89PNG\r\n", "is a picture"),
        (b"\x83\xa6params\x81", "is a Flax file"),
        (b'{"_class_name": "AutoencoderKL"}', "is a JSON file"),
        (bytes(100), "begins with zeros only"),
        (b"", r"is empty \(0 bytes\)"),
        (b"PK\x03\x04 cut short", "is truncated: it is a zip archive without its end"),
        (b"Entry not found\n", r"is not a PyTorch checkpoint, but a text \('Entry not found'\): dow"),
        (b'{"error": "Access denied"}', "is a server's error message"),
        (b"\x08\x08\x12\x07pytorch\x1a\x062.1.0", "is an ONNX program"),
        (b"sys_info".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"), r"is a file of PyTorch's before 0\.1\.10"),
        (b"vae/config.json".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"), "is a tar archive: unpack it first"),
        (b"\x01\x02 binary", "is not a PyTorch checkpoint"),
    ],
)
def test_what_a_file_is_by_its_content(content, message, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(TensorFileError, match=message):
        open_weights(tmp_path / "model.ckpt")


def test_archives_that_hold_other_things(tmp_path):
    np.savez(tmp_path / "x.pt", x=np.ones(3))
    (tmp_path / "x.pt.npz").rename(tmp_path / "x.pt")
    with pytest.raises(TensorFileError, match=r"is a NumPy archive \(\.npz\); write its arrays as \.safetensors"):
        open_weights(tmp_path / "x.pt")
    for name, message in (("a/models/model.json", "is a program of torch.export"), ("vae/x", "unpack it first")):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr(name, b"{}")
        with pytest.raises(TensorFileError, match=message):
            open_weights(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"y/{name}", b"\x80\x02N.")
    with pytest.raises(TensorFileError, match="is a TorchScript program"):
        open_weights(tmp_path / "y.pt")
    torch.save({"epoch": 3}, tmp_path / "z.pt")
    with pytest.raises(TensorFileError, match="holds no tensors"):
        open_weights(tmp_path / "z.pt")
    with pytest.raises(TensorFileError, match="no weights file at"):
        open_weights(tmp_path / "none.pt")
    with pytest.raises(TensorFileError, match="cannot be read: Is a directory"):
        open_weights(tmp_path)


def test_wrappers_are_taken_off_the_names(tmp_path):
    one = np.ones(1, np.float32)
    save_file({"module._orig_mod.a.x": one, "b._fsdp_wrapped_module.x": one}, tmp_path / "x.safetensors")
    assert set(open_weights(tmp_path / "x.safetensors").tensors) == {"a.x", "b.x"}
    save_file({"module.x": one, "x": one}, tmp_path / "y.safetensors")
    with pytest.raises(TensorFileError, match="holds two tensors x"):
        open_weights(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.bin", "m.safetensors"], ["m.safetensors"]),
        (["m.fp16.safetensors", "m.safetensors"], ["m.safetensors"]),
        (["m.bf16.safetensors"], ["m.bf16.safetensors"]),
        (["m.non_ema.bin"], ["m.non_ema.bin"]),
        (["m.ema.safetensors", "m.fp16.safetensors"], ["m.fp16.safetensors"]),
        (["n.safetensors"], ["n.safetensors"]),
        (["m.fp16.safetensors", "m.bin"], ["m.fp16.safetensors"]),
        # Shards whose index was not downloaded.
        (["m-00001-of-00002.bin", "m-00002-of-00002.bin"], ["m-00001-of-00002.bin", "m-00002-of-00002.bin"]),
    ],
)
def test_files_of_a_folder(names, chosen, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path, "m", "n")] == chosen


def test_folders_without_one_set_of_weights(tmp_path):
    with pytest.raises(TensorFileError, match=r"has a config\.json but no m\.safetensors$"):
        weight_files(tmp_path, "m")
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(TensorFileError, match=r"there is flax_model\.msgpack"):
        weight_files(tmp_path, "m")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TensorFileError, match=r"there is pytorch_model\.bin: to read one of them, name the file"):
        weight_files(tmp_path, "m")
    (tmp_path / "m-00002-of-00003.bin").touch()
    with pytest.raises(TensorFileError, match=r"holds 1 of 3 shards.*download the others"):
        weight_files(tmp_path, "m")
    for content, message in (("{}", "has no weight_map"), ('{"weight_map": {"x": "a.bin"}}', "not there: a.bin")):
        (tmp_path / "m.bin.index.fp16.json").write_text(content)
        with pytest.raises(TensorFileError, match=message):
            weight_files(tmp_path, "m")
    (tmp_path / "m.bin.index.fp16.json").unlink()
    for name in ("m.ema.bin", "m.non_ema.bin"):
        (tmp_path / name).touch()
    with pytest.raises(TensorFileError, match=r"holds several variants: m\.ema\.bin, m\.non_ema\.bin"):
        weight_files(tmp_path, "m")


def test_a_target_is_whole_or_not_there(tmp_path):
    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"out cannot be written: No space left on device"):
        write_atomically(tmp_path / "out", full)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="no space left on the device"):
        check_space(tmp_path / "out", 2**80)
    write_atomically(tmp_path / "deep" / "out", lambda path: path.write_text("all") and None)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def damaged(rng, path, whole):
    """A file cut, with bits flipped or bytes put in: mostly in its head and end, where everything hangs on them."""
    data = bytearray(whole)
    match rng.integers(4):
        case 0:
            data = data[: rng.integers(len(data))]
        case 1:
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(min(len(data), 400))] ^= 1 << rng.integers(8)
        case 2:
            for _ in range(rng.integers(1, 5)):
                data[-int(rng.integers(1, min(len(data), 400)))] ^= 1 << rng.integers(8)
        case 3:
            place = rng.integers(len(data))
            data[place:place] = rng.integers(0, 256, rng.integers(1, 20), np.uint8).tobytes()
    path.write_bytes(data)


def read_or_refused(path):
    """The tensors, or the error's message."""
    read = {}
    try:
        for name, tensor in open_weights(path).tensors.items():
            read[name.removeprefix("state_dict.")] = tensor.read()
            assert read[name.removeprefix("state_dict.")].size < 1000
    except TensorFileError as error:
        return str(error)
    return read


@pytest.mark.parametrize("form", ["safetensors", "zip", "before 1.6", "ours"])
def test_damaged_files_are_read_or_refused_in_one_line(form, tmp_path):
    """Seeded: 100 of each form. Whatever is damaged, there is a tensor or an error for the user, and no other end."""
    whole, path = tmp_path / "whole", tmp_path / "damaged.bin"
    tensors = {f"encoder.{i}.weight": torch.full((2, i + 1), float(i)) for i in range(5)}
    if form == "safetensors":
        save_file({name: x.numpy() for name, x in tensors.items()}, whole)
    elif form == "ours":
        arrays = {name: x.numpy() for name, x in tensors.items()}
        pickles.write(whole, arrays.items(), {name: x.shape for name, x in arrays.items()}, scaling_factor=0.5)
    else:
        torch.save({"state_dict": tensors, "epoch": 1}, whole, _use_new_zipfile_serialization=form == "zip")
    content, outcomes = whole.read_bytes(), collections.Counter[str]()
    for seed in range(100 * TIMES):
        damaged(np.random.default_rng(seed), path, content)
        result = read_or_refused(path)
        if isinstance(result, str):
            assert str(path) in result
            assert "\n" not in result
            outcomes["refused in one line"] += 1
        else:
            same = all(name in result and np.array_equal(result[name], x.numpy()) for name, x in tensors.items())
            outcomes["read as they were" if same else "read, with changed numbers or names"] += 1
    tell(f"damaged weights files ({form})", outcomes)
    assert 0.25 <= outcomes["refused in one line"] / outcomes.total() <= 1
