"""Times whole processes from start to a written picture, cold and warm: asymvq benchmark start_up [--size 256].

Cold: nothing is compiled yet. Warm: the compilation cache holds the programs of an earlier process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asymvq_jax.commands.entry import command
from asymvq_jax.config import load_config
from asymvq_jax.files import images
from benchmarks import contest, subjects

# What a server does with an exported decoder: JAX and numpy, nothing of this package.
SERVE = """
import sys
import jax, numpy as np
from jax import export
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
program = export.deserialize(open(sys.argv[1], "rb").read())
result = program.call(*(np.zeros(x.shape, x.dtype) for x in program.in_avals))
np.save(sys.argv[2], result)
"""


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Time whole processes from start to a written picture, cold and warm."""

    # A published configuration by its name, such as base, or a Python file that defines get_config().
    config: str = "base"
    # Height and width of the picture, px.
    size: int = 256
    # Timed processes of each kind, of which the median is printed.
    rounds: int = 3


def work(options: StartUp) -> None:
    """Measures, and prints a table."""
    config = load_config(options.config).model
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model, _ = subjects.random_weights(config, folder)
        arrays = subjects.pictures(config, 1, options.size)
        files = {name: str(folder / f"{name}.png") for name in ("image", "mask", "out")}
        images.write(files["image"], images.to_uint8(arrays["image"][0]))
        images.write(files["mask"], np.repeat(arrays["mask"][0] * 255, 3, axis=-1).astype(np.uint8))
        exported = str(folder / "decoder.jax")
        size = f"{options.size}x{options.size}"
        _run(
            [
                sys.executable,
                "-m",
                "asymvq_jax",
                "export",
                f"--checkpoint={model}",
                f"--out={exported}",
                f"--size={size}",
            ],
            folder / "unused",
        )
        commands = {
            "asymvq inpaint": [
                *(sys.executable, "-m", "asymvq_jax", "inpaint", f"--checkpoint={model}"),
                *(f"--{name}={file}" for name, file in files.items()),
            ],
            "a server with the exported decoder": [sys.executable, "-c", SERVE, exported, str(folder / "out.npy")],
        }
        rows = []
        for name, command in commands.items():
            caches = [folder / f"cache {len(rows)} {i}" for i in range(options.rounds)]
            cold = [_run(command, cache) for cache in caches]
            warm = [_run(command, caches[-1]) for _ in caches]
            rows.append((name, statistics.median(cold), statistics.median(warm)))
    print(f"\n{options.config}, one picture of {options.size} x {options.size} px; medians of {options.rounds}")
    print(contest.machine())
    print("\n| | cold | warm |\n| --- | --- | --- |")
    for name, cold, warm in rows:
        print(f"| {name} | {cold:.1f} s | {warm:.1f} s |")


def _run(command: Sequence[str], cache: Path) -> float:
    begin = time.perf_counter()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


main = command("asymvq benchmark start_up", StartUp, work)
