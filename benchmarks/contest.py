"""Times contenders by turns, each alive in a process of its own, and prints what they took as a table."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from asymvq_jax.config import Dtype

# Runs once and returns when the device is done, with what fetches the result to the host.
Run = Callable[[], Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    # Called in the contender's own process: prepares everything, and returns what is timed. A module's function.
    prepare: Callable[..., Run]
    arguments: dict[str, Any]


@dataclass
class Result:
    """What a contender took."""

    name: str
    # Seconds of each timed run; empty where it failed, or where no more than the first run was wanted.
    seconds: list[float] = field(default_factory=list)
    # Seconds until the first run was done: reading, compiling, running once.
    start: float = 0.0
    # Bytes: the most that its process held until then, on the accelerator if there is one.
    memory: int = 0
    output: np.ndarray | None = None
    # The last line of the exception that ended it.
    failure: str | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a contest with PyTorch."""

    # A published configuration by its name, such as base, or a Python file that defines get_config().
    config: str = "base"
    # Height and width of the pictures, px.
    size: int = 256
    # Pictures at once.
    batch: int = 1
    # Compute type.
    dtype: Dtype = "float32"
    # Timed runs of each contender.
    rounds: int = 11


def hold(contenders: Sequence[Contender], rounds: int, warm_up: int = 2) -> list[Result]:
    """Prepares all contenders, warms them up, and times them by turns, so that the machine's moods are fair to all.

    A contender that fails is left out of the later rounds, and its result says why.
    """
    context = multiprocessing.get_context("spawn")
    results, workers = [], []
    try:
        for contender in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, contender), daemon=True)
            process.start()
            # Without this copy of their end, the death of a process is seen as the end of the pipe.
            theirs.close()
            result = Result(contender.name)
            workers.append((result, ours, process))
            results.append(result)
            print(f"preparing {contender.name} ...", flush=True)
            _ask(result, ours, "prepare")
            for _ in range(warm_up):
                _ask(result, ours, "warm up")
        for i in range(rounds):
            for result, connection, _ in workers[i % len(workers) :] + workers[: i % len(workers)]:
                _ask(result, connection, "time")
            print(f"round {i + 1} of {rounds}: {_last(results)}", flush=True)
    finally:
        for _, connection, process in workers:
            with suppress(OSError):
                connection.send("stop")
            process.join(timeout=10)
            process.kill()
    return results


def _last(results: Sequence[Result]) -> str:
    return ", ".join(f"{r.name} {r.seconds[-1]:.4g} s" for r in results if r.failure is None)


def _ask(result: Result, connection: Connection, task: str) -> None:
    if result.failure is not None:
        return
    try:
        connection.send(task)
        answer = connection.recv()
    except (EOFError, OSError):
        answer = RuntimeError("its process died (out of memory?)")
    if isinstance(answer, Exception):
        result.failure = str(answer).splitlines()[-1]
        result.seconds.clear()
    elif task == "prepare":
        result.start, result.memory, result.output = answer
    elif task == "time":
        result.seconds.append(answer)


def _work(connection: Connection, contender: Contender) -> None:
    begin = time.perf_counter()
    run = None
    while True:
        task = connection.recv()
        if task == "stop":
            return
        try:
            if task == "prepare":
                run = contender.prepare(**contender.arguments)
                fetch = run()
                answer = time.perf_counter() - begin, peak_memory(), np.asarray(fetch())
            else:
                start = time.perf_counter()
                run()
                answer = time.perf_counter() - start
        except Exception:
            connection.send(RuntimeError(traceback.format_exc().strip()))
            return
        connection.send(answer)


def peak_memory() -> int:
    """Bytes: the most that this process has held, on the accelerator if there is one."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if (jax := sys.modules.get("jax")) and (stats := jax.devices()[0].memory_stats()):
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: Sequence[Result], images: int, flops: float | None = None) -> str:
    """A markdown table, in which everyone is compared with the fastest contender that is not ours.

    Args:
        results: from `hold`; those whose name begins with "ours" are ours.
        images: pictures in one run.
        flops: of one run of ours, for its FLOP/s; PyTorch's way may take more of them.
    """
    theirs = [r.median for r in results if r.seconds and not r.name.startswith("ours")]
    rows = [["", "speed to PyTorch's best", "median", "fastest to slowest", "images/s", "TFLOP/s", "start", "memory"]]
    for r in results:
        if r.failure is not None:
            rows.append([r.name, "", f"failed: {r.failure}", "", "", "", "", ""])
            continue
        rows.append(
            [
                r.name,
                f"{min(theirs) / r.median:.2f}" if theirs else "",
                f"{r.median:.4g} s",
                f"{min(r.seconds):.4g} to {max(r.seconds):.4g} s",
                f"{images / r.median:.4g}",
                f"{flops / r.median / 1e12:.3g}" if flops and r.name.startswith("ours") else "",
                f"{r.start:.1f} s",
                f"{r.memory / 2**30:.2f} GiB",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def difference(results: Sequence[Result]) -> str:
    """How far the first contender's result is from the others', as a share of its range."""
    outputs = [r.output for r in results if r.output is not None]
    if len(outputs) < 2:
        return "nothing to compare"
    spread = float(np.ptp(outputs[0]))
    return f"{max(float(np.abs(outputs[0] - x).max()) for x in outputs[1:]) / spread:.1e} of the range"


def matrix_peak(dtype: Dtype) -> float:
    """FLOP/s of products of two matrices with sides of `peak_side()`: the fastest of five."""
    import jax
    import jax.numpy as jnp

    side, count = peak_side(), 1 if jax.default_backend() == "cpu" else 10
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    jax.block_until_ready(product(a, a))
    spent = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready([product(a, a) for _ in range(count)])
        spent.append((time.perf_counter() - begin) / count)
    return 2 * side**3 / min(spent)


def peak_side() -> int:
    """Of the matrices that show the device's peak."""
    import jax

    return 2048 if jax.default_backend() == "cpu" else 8192


def machine() -> str:
    """The machine and the versions, in one line."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device_name()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {named}"


def device_name() -> str:
    """JAX's first device; of a CPU the processor's name."""
    import jax

    device = jax.devices()[0]
    return _processor() if device.platform == "cpu" else str(device.device_kind)


def versions() -> dict[str, str]:
    """Of the libraries that both sides use, those that are installed."""
    result = {}
    for name in ("jax", "flax", "torch", "diffusers"):
        with suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
