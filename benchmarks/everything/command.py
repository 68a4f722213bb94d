"""Runs each group of cases in a process of its own, as long as there is time, and keeps what is known on a page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype, load_config
from asymvq_jax.errors import UserError
from asymvq_jax.files.outputs import check_writable, write_bytes
from benchmarks.everything import page
from benchmarks.everything.cases import OURS, SUBJECTS, Case, Group, Settings, groups, read, write_json

# A group is not begun with less left: its process would not come to measure anything.
LEAST_SECONDS = 12.0
DEVICE = Group((Case("device", OURS, "", 0, 0),), 60)


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Measure all that a new accelerator is asked, in order of worth, as far as the time allows.

    The matrix peak, the decode, the training step, text-to-image and the wait for input, beside PyTorch where it is
    installed. A page and JSON files in --out have what is known so far; the same command again goes on from there.
    """

    # The directory for benchmarks.md, the measurements and the logs.
    out: str
    # Time for this call.
    minutes: float = 9.0
    # Configurations, the most important first; by default x2, base and x1_5, on a CPU base, x1_5 and x2.
    configs: tuple[str, ...] | None = None
    # Sides of the pictures, px; training takes the smallest, text-to-image the largest.
    sizes: tuple[int, ...] = (256, 512)
    # Pictures at once; training takes the most.
    batches: tuple[int, ...] = (1, 8)
    # What to measure: decode, train_step, generate (text-to-image), input.
    subjects: tuple[str, ...] = SUBJECTS
    # Compute type; by default bfloat16 on accelerators and float32 on a CPU.
    dtype: Dtype | None = None


def work(options: Everything) -> None:
    """Measures what is not known yet."""
    end = time.monotonic() + 60 * options.minutes
    folder = Path(options.out).absolute()
    check_writable(str(folder / "benchmarks.md"), (".md",))
    for name, value in (("sizes", options.sizes), ("batches", options.batches), ("configs", options.configs)):
        if value is not None and (not value or (name != "configs" and min(map(int, value)) < 1)):
            raise UserError(f"--{name}: expected one or more values, each at least 1")
    for name in options.configs or ():
        load_config(name)
    if unknown := set(options.subjects) - set(SUBJECTS):
        raise UserError(f"--subjects: {', '.join(sorted(unknown))}: expected some of {', '.join(SUBJECTS)}")
    found = all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers"))
    settings = Settings(options.configs, options.sizes, options.batches, options.subjects, options.dtype, found)
    device = _device(folder, settings, end)
    print(f"{device['name']}: {device['peak'] / 1e12:.4g} TFLOP/s in products of {device['dtype']}", flush=True)
    if not found:
        print("PyTorch and diffusers are not installed: only ours is measured", flush=True)
    everything = groups(settings, device["platform"])
    tried = _read_json(folder / "tried.json")
    # What was begun and not finished comes last: it may take as long again.
    for group in sorted(everything, key=lambda g: tried.get(g.name, 0)):
        if all((known := read(case, folder)) and known.done for case in group.cases):
            continue
        if end - time.monotonic() < LEAST_SECONDS:
            break
        tried[group.name] = tried.get(group.name, 0) + 1
        write_json(folder / "tried.json", tried)
        said = run_group(group, folder, settings, device, end)
        print(f"{group.name}: {said}", flush=True)
        _write_page(folder, device, everything, settings)
    _write_page(folder, device, everything, settings)
    print(f"{folder / 'benchmarks.md'}: {page.progress(everything, folder)}")


def _device(folder: Path, settings: Settings, end: float) -> dict[str, Any]:
    """Measures the device; what is known of another one is not mixed with it."""
    file, before = folder / "device.json", _read_json(folder / "device.json")
    file.unlink(missing_ok=True)
    said = run_group(DEVICE, folder, settings, {}, end)
    found = _read_json(file)
    if not found:
        if before:
            write_json(file, before)
        raise UserError(f"the device could not be measured: {said}; see {_log(DEVICE, folder)}")
    for name in ("name", "count", "versions", "dtype"):
        if before and before[name] != found[name]:
            write_json(file, before)
            raise UserError(
                f"--out {folder} has measurements with another {name}: {before[name]}, now {found[name]}; "
                "choose another directory"
            )
    return found


def run_group(group: Group, folder: Path, settings: Settings, device: dict[str, Any], end: float) -> str:
    """Measures a group in a process of its own, and says how that ended."""
    seconds = min(group.limit, end - time.monotonic())
    log = _log(group, folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    task = {
        "group": dataclasses.asdict(group),
        "folder": str(folder),
        "dtype": device.get("dtype") or settings.dtype,
        "device": device,
        "seconds": seconds,
    }
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    begin = time.monotonic()
    with log.open("wb") as output:
        # A session of its own, so that also the processes that it starts can be ended.
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.everything.worker", json.dumps(task)],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"ended after its {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"failed with exit code {code}: {lines[-1] if lines else 'no output'}"
    return f"{time.monotonic() - begin:.0f} s"


def _log(group: Group, folder: Path) -> Path:
    return folder / "logs" / (group.name.replace(", ", "-").replace(" ", "_") + ".log")


def _write_page(folder: Path, device: dict[str, Any], everything: list[Group], settings: Settings) -> None:
    text = page.write(device, everything, folder, compared=settings.torch)
    write_bytes(str(folder / "benchmarks.md"), text.encode())


def _read_json(file: Path) -> dict[str, Any]:
    """The dictionary in a file; empty where there is no file."""
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return values


main = command("asymvq benchmark everything", Everything, work)
