"""Time and peak memory of converting the autoencoder out of a whole Stable Diffusion 1 checkpoint of 2 GB.

    python -m benchmarks.convert_memory [--folder DIR]

Makes the checkpoint on the spot, in the form in which the original was published: all tensors of the full-size model
with random weights in float16, in the file of a PyTorch Lightning training with its callbacks and counters. It is
converted, and as .safetensors too, each in a process of its own. The peak is the operating system's; the libraries'
own memory is the peak of a process that converts a tiny autoencoder.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.mapping import Weight, weights
from asymvq_jax.diffusion import mapping
from asymvq_jax.diffusion.clip import TextConfig, TextEncoder, TransformerConfig
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.models.parameters import seeded

Shapes = dict[str, tuple[int, ...]]
TEXT = TextConfig(TransformerConfig(768, 3072, 12, 12, "quick_gelu", 1e-5), 49408, 77)
# Prints one line: seconds, and the peak of resident memory in MB.
RUN = """
import resource, sys, time
from asymvq_jax.commands.convert import main
begin = time.perf_counter()
code = main([*sys.argv[1:], "--to", "diffusers"])
print(round(time.perf_counter() - begin, 1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
sys.exit(code)
"""


def checkpoint_shapes(vae: ModelConfig, *, whole: bool = True) -> Shapes:
    """The names and shapes of an original checkpoint's tensors, or of its autoencoder's alone."""
    shapes = _named("first_stage_model.", weights(vae, "ldm"))
    if whole:
        unet = nnx.eval_shape(lambda: UNet(UNetConfig(), rngs=seeded(0)))
        text = nnx.eval_shape(lambda: TextEncoder(TEXT, rngs=seeded(0)))
        shapes |= _named("model.diffusion_model.", mapping.unet_weights(unet, "ldm"))
        shapes |= _named("cond_stage_model.transformer.text_model.", mapping.text_weights(text, "diffusers"))
    return shapes


def _named(prefix: str, named: list[Weight]) -> Shapes:
    return {prefix + weight.name: weight.torch_shape for weight in named}


def values(shapes: Shapes) -> Iterator[np.ndarray]:
    """Random float16 numbers for each, the same few over and over, for speed."""
    some = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)
    for shape in shapes.values():
        count = math.prod(shape)
        yield np.resize(some, count).reshape(shape)


def write_safetensors(path: Path, shapes: Shapes) -> None:
    """Writes the tensors one by one, so that this script needs little memory itself."""
    head, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        head[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values(shapes):
            file.write(value.data)


def write_lightning(path: Path, shapes: Shapes) -> None:
    """As torch.save writes a Lightning training's checkpoint: the class of a callback among the keys, and counters."""

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    def tuple_of(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in numbers) + b"t"

    program = b"\x80\x02}(" + text("callbacks") + b"}cpytorch_lightning.callbacks\nModelCheckpoint\n}s"
    program += text("global_step") + b"J" + (470_000).to_bytes(4, "little") + text("state_dict") + b"}("
    for i, (name, shape) in enumerate(shapes.items()):
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = b"(" + text("storage") + b"ctorch\nHalfStorage\n" + text(str(i)) + text("cpu")
        storage += b"J" + math.prod(shape).to_bytes(4, "little") + b"tQ"
        program += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + tuple_of(shape)
        program += tuple_of(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sd/data.pkl", program + b"uu.")
        for i, value in enumerate(values(shapes)):
            with archive.open(f"sd/data/{i}", "w", force_zip64=True) as file:
                file.write(value.data)
        archive.writestr("sd/version", "3\n")


def measure(source: Path) -> tuple[float, float]:
    """Seconds and peak MB of a conversion in a process of its own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-c", RUN, str(source), f"{folder}/out"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = said.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    """Makes the files, converts them, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the files are made, 5 GB; default: the system's temporary directory")
    options = parser.parse_args()
    small = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), condition=False)
    full = ModelConfig(condition=False)
    wanted = 4 * sum(math.prod(shape) for shape in checkpoint_shapes(full, whole=False).values()) / 1e6
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tiny = Path(folder) / "tiny.safetensors"
        write_safetensors(tiny, checkpoint_shapes(small, whole=False))
        _, base = measure(tiny)
        print(f"the libraries alone: {base:.0f} MB; the autoencoder in float32: {wanted:.0f} MB\n")
        print("| source | size, GB | time, s | peak, MB | above the libraries' own, of the wanted part |")
        print("| --- | --- | --- | --- | --- |")
        shapes = checkpoint_shapes(full)
        for name, write in (("Lightning's .ckpt", write_lightning), (".safetensors", write_safetensors)):
            path = Path(folder) / f"sd1{name[name.index('.') :]}"
            write(path, shapes)
            size = path.stat().st_size / 1e9
            seconds, peak = measure(path)
            print(f"| {name} | {size:.2f} | {seconds:.0f} | {peak:.0f} | {(peak - base) / wanted:.2f} x |")
            path.unlink()


if __name__ == "__main__":
    main()
