"""The process that measures one group: python -m benchmarks.everything.worker TASK, a JSON of `command`."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from asymvq_jax.config import Config, Dtype, ModelConfig, load_config
from asymvq_jax.devices import sharding
from asymvq_jax.devices.waiting import Watch
from asymvq_jax.diffusion.unet import UNetConfig
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.training.loop import Run
from benchmarks import contest, decode, generate, subjects, train_step
from benchmarks.everything.cases import COMPILED, OURS, STEPS, Case, Measurement, read, write_json
from benchmarks.input import write_files

# A case is timed for so many seconds and runs, whichever is reached first.
SECONDS, RUNS = 3.0, 30
# Published peaks of dense bfloat16 products, FLOP/s, by a part of JAX's name of the device; the first that fits.
PEAKS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip
# Steps of the training run between two figures of its waiting, and figures that are wanted after the first.
LAP, LAPS = 10, 3


@dataclass(frozen=True)
class Task:
    """What a process measures, and where it writes that."""

    cases: tuple[Case, ...]
    folder: Path
    dtype: Dtype | None
    device: dict[str, Any]
    # time.monotonic() at which the process is ended.
    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def main(text: str) -> None:
    """Measures the cases that are not known yet, and keeps each as soon as it is known."""
    values = json.loads(text)
    cases = tuple(Case(**case) for case in values["group"]["cases"])
    end = time.monotonic() + values["seconds"]
    task = Task(cases, Path(values["folder"]), values["dtype"], values["device"], end)
    logging.getLogger("asymvq_jax").setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING)
    subject = cases[0].subject
    if subject == "device":
        measure_device(task)
    elif subject == "input":
        # The process that timed the training step keeps its program there.
        jax.config.update("jax_compilation_cache_dir", str(task.folder / "cache"))
        measure_input(task)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            measure(task, Path(scratch))


def measure_device(task: Task) -> None:
    """What the device is, and how fast it multiplies large matrices."""
    devices = jax.devices()
    platform = "gpu" if devices[0].platform in ("gpu", "cuda", "rocm") else devices[0].platform
    dtype = task.dtype or ("float32" if platform == "cpu" else "bfloat16")
    name = contest.device_name()
    published = next((peak for part, peak in PEAKS.items() if part in name), None)
    found = {
        "name": name,
        "platform": platform,
        "count": len(devices),
        "cores": len(os.sched_getaffinity(0)),
        "versions": contest.versions(),
        "dtype": dtype,
        "side": contest.peak_side(),
        "peak": contest.matrix_peak(dtype),
        "published": published if dtype == "bfloat16" else None,
    }
    write_json(task.folder / "device.json", found)


def measure(task: Task, scratch: Path) -> None:
    """Times the cases of one subject and contender."""
    prepare: Callable[[Case], contest.Run] | None = None
    for case in task.cases:
        known = read(case, task.folder)
        if known is not None and known.done:
            continue
        flops = _flops(task, case)
        least = 2 * flops / task.device["peak"] if flops else 0.0
        if least > task.left:
            reason = f"two runs take at least {least:.0f} s by the matrix peak, and {task.left:.0f} s were left"
            Measurement(case, flops=flops, skipped=reason).write(task.folder)
            continue
        begin = time.perf_counter()
        try:
            prepare = prepare or _preparation(task, case, scratch)
            _time(prepare(case), case, flops, begin, task).write(task.folder)
        # Of memory, of a kernel that the compiler lacks, and whatever else one side fails by.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            Measurement(case, flops=flops, error=reason[:200].replace("|", "/")).write(task.folder)
            logging.getLogger(__name__).exception("%s", case)
        gc.collect()


def _time(run: contest.Run, case: Case, flops: float | None, begin: float, task: Task) -> Measurement:
    run()
    first, memory = time.perf_counter() - begin, contest.peak_memory()
    seconds: list[float] = []
    # The first of these is a second warming up, unless there is no time for another.
    while len(seconds) < 2 or (sum(seconds[1:]) < SECONDS and len(seconds) <= RUNS):
        if seconds and task.left < 1.5 * seconds[-1] + 1:
            break
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Measurement(case, seconds[1:] or seconds, first, memory, flops)


def _flops(task: Task, case: Case) -> float | None:
    """Of one run of ours; for the others only if ours has been counted."""
    ours = read(Case(case.subject, OURS, case.config, case.size, case.batch), task.folder)
    if case.contender != OURS or (ours is not None and ours.flops):
        return ours.flops if ours else None
    if case.subject == "decode":
        config = load_config(case.config).model
        return decode.flops(config, subjects.pictures(config, case.batch, case.size))
    if case.subject == "train_step":
        config = step_config(case, task.dtype, task.folder)
        return train_step.flops(config, subjects.pictures(config.model, case.batch, case.size))
    unet = UNetConfig()
    return generate.flops(unet, generate.inputs(unet, case.batch, case.size), STEPS)


def step_config(case: Case, dtype: str | None, data: Path, **more: str) -> Config:
    """A training of a case's model, size and batch, with the discriminator from the first step on."""
    fields = {
        "model.dtype": dtype,
        "data.image_size": case.size,
        "data.batch_size": case.batch,
        "data.source": "folder",
        "data.path": data,
        "data.workers": 0,
        "loss.gan_start": 0,
        "run.steps": 100_000,
        "run.init_from": "random",
        "run.log_every": LAP,
        "run.eval_pictures": case.batch,
        **more,
    }
    return load_config(case.config, [f"--{name}={value}" for name, value in fields.items()])


def _preparation(task: Task, case: Case, scratch: Path) -> Callable[[Case], contest.Run]:
    """What makes the runs of a subject's cases by one contender, from random weights."""
    if case.contender == OURS:
        return _ours(task, case)
    return _theirs(task, case, scratch)


def _ours(task: Task, case: Case) -> Callable[[Case], contest.Run]:
    assert task.dtype is not None
    if case.subject == "train_step":
        # Compiled anew, so that the first run says what compilation takes; a later training run finds it.
        cache = task.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        config = step_config(case, task.dtype, task.folder)
        return lambda case: train_step.training(config, subjects.pictures(config.model, case.batch, case.size))
    jax.config.update("jax_enable_compilation_cache", False)
    if case.subject == "decode":
        model = load_config(case.config, [f"--model.dtype={task.dtype}"]).model
        autoencoder = subjects.random_model(model)
        return lambda case: decode.decoding(autoencoder, subjects.pictures(model, case.batch, case.size))
    unet = UNetConfig()
    network = subjects.random_unet(unet, task.dtype)
    plain = subjects.random_model(ModelConfig(condition=False, dtype=task.dtype))
    return lambda case: generate.generating(
        network, plain, generate.inputs(unet, case.batch, case.size), steps=STEPS
    )  # fmt: skip


def _theirs(task: Task, case: Case, scratch: Path) -> Callable[[Case], contest.Run]:
    # The accelerator is left to PyTorch.
    jax.config.update("jax_platforms", "cpu")
    import torch

    from benchmarks import peers

    if task.device["platform"] == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    shared: dict[str, Any] = {"dtype": task.dtype, "compiled": case.contender == COMPILED}
    if case.subject == "generate":
        peers.random_stable_diffusion(str(scratch))
        sampler = {"schedule": generate.SCHEDULE, "guidance": generate.GUIDANCE, "steps": STEPS}
        unet = UNetConfig()
        return lambda case: peers.generate(
            str(scratch), generate.inputs(unet, case.batch, case.size), **sampler, **shared
        )  # fmt: skip
    config = load_config(case.config).model
    folder = subjects.their_weights(config, scratch)

    def arrays(case: Case) -> dict[str, np.ndarray]:
        return subjects.pictures(config, case.batch, case.size)

    if case.subject == "train_step":
        return lambda case: peers.train(folder, arrays(case), once=True, **shared)
    return lambda case: peers.decode(folder, arrays(case), channels_last=True, **shared)


class _Enough(Exception):
    """Ends a training run without a checkpoint."""


def measure_input(task: Task) -> None:
    """A real training run on files like ImageNet's: how long its steps waited for them."""
    (case,) = task.cases
    with tempfile.TemporaryDirectory() as scratch:
        files, encoder, run = (Path(scratch) / name for name in ("files", "encoder", "run"))
        write_files(files)
        model = load_config(case.config).model
        narrow = {"decoder_channels": (32,) * len(model.decoder_channels), "decoder_blocks": 1, "condition": False}
        save_model(str(encoder), subjects.random_model(ModelConfig(**{**model.encoder_fields(), **narrow})))
        more = {
            "run.directory": str(run),
            "run.init_from": str(encoder),
            "data.workers": str(0 if task.device["platform"] == "cpu" else min(8, task.device["cores"] // 2)),
        }
        config = step_config(case, task.dtype, files, **more)
        laps = run / "metrics.jsonl"

        def ask() -> None:
            lines = len(laps.read_text().splitlines()) if laps.exists() else 0
            if lines > LAPS or (lines > 1 and task.left < 5):
                _stop()

        def _stop() -> NoReturn:
            raise _Enough

        mesh = sharding.make_mesh(config.mesh)
        try:
            with (
                Watch(config.run.wait_limit, "start the benchmark again") as watch,
                Run(config, mesh, watch) as training,
                jax.set_mesh(mesh),
            ):
                training.to_the_end(ask)
        except _Enough:
            # The first lap has the compilation in it.
            rows = [json.loads(line) for line in laps.read_text().splitlines()][1:]
            waiting, speed = (
                statistics.median(row[name] for row in rows) for name in ("input_wait_share", "images_per_second")
            )
            Measurement(case, waiting=waiting, images_per_second=speed).write(task.folder)


if __name__ == "__main__":
    main(sys.argv[1])
