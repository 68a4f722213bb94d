"""Ends a small run of several processes again and again, at random, and compares it with an undisturbed one.

asymvq benchmark endurance [--kills 200] ends with exit code 1 unless the parameters and metrics.jsonl are equal, bit
for bit. With --steps 5000 it disturbs nothing, and prints the memory of such a run instead.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from asymvq_jax.commands.entry import command
from asymvq_jax.errors import ExitCode
from asymvq_jax.models.checkpoints import load_parameters
from benchmarks import contest

ROOT = Path(__file__).parents[1]
# Steps between two checkpoints; seconds that a start or an end may take, and a step, with its share of a checkpoint.
SAVED_EVERY, DEADLINE, STEP_DEADLINE = 5, 300, 5
# Steps within which SIGTERM ends a run: all processes have to agree on one.
STEPS_TO_STOP = 50
# What metrics.jsonl says of the clock, which differs from run to run.
TIMES = {"images_per_second", "input_wait_share", "goodput", "seconds"}
TIMES_OF = ("step_seconds/", "spent/")
# Collectives listen on the host's own name otherwise, which need not lead back to it.
LAUNCHER = """
import functools, sys
from jaxlib import _jax
_jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
from asymvq_jax.__main__ import run
run()
"""
CONFIG = """
from asymvq_jax.config import *

def get_config():
    model = ModelConfig(
        encoder_channels=(8, 8), decoder_channels=(8, 8), encoder_blocks=1, decoder_blocks=1, norm_groups=4,
        mid_attention=False,
    )
    return Config(
        run=RunConfig(
            train_encoder=True, steps={steps}, log_every=1, eval_every={saved_every}, eval_pictures=8, keep=2,
            wait_limit=120,
        ),
        model=model,
        # A discriminator that never starts is saved all the same.
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=1, discriminator_layers=1),
        data=DataConfig(image_size=16, batch_size=8),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, schedule="constant"),
    )
"""


@dataclass(frozen=True, kw_only=True)
class Endurance:
    """Kill and stop a small run at random, and compare its end with that of an undisturbed one."""

    # How often it is disturbed: SIGKILL or SIGTERM, to one process or to all.
    kills: int = 200
    # Processes of the run.
    processes: int = 2
    # Of when and how.
    seed: int = 0
    # Of one process that nothing disturbs, whose memory is printed ten times. 0: disturb a run.
    steps: int = 0


def work(options: Endurance) -> int:
    """Disturbs, compares, and prints what was done; returns the exit code."""
    if options.steps:
        return _memory(options.steps)
    random.seed(options.seed)
    steps = (2 * options.kills + 1) * SAVED_EVERY
    done: Counter[str] = Counter()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "config.py").write_text(CONFIG.format(steps=steps, saved_every=SAVED_EVERY))
        codes = _wait(_start(folder, "undisturbed", options.processes), steps)
        if any(codes):
            raise RuntimeError(f"the undisturbed run ended with {codes}:\n{_end_of_log(folder, 'undisturbed')}")
        for i in range(options.kills):
            how = _disturb(folder, options.processes)
            done[how] += 1
            if sys.stderr.isatty() or (i + 1) % 20 == 0:
                print(f"{i + 1} of {options.kills}, at step {_last_step(folder)} of {steps}: {how}", flush=True)
        codes = _wait(_start(folder, "disturbed", options.processes), steps)
        problems = _differences(folder, codes)
    kinds = ", ".join(f"{count} {how}" for how, count in sorted(done.items()))
    print(
        f"\n{options.processes} processes, {steps} steps, {options.kills} disturbances in "
        f"{time.perf_counter() - begin:.0f} s: {kinds}"
    )
    print(contest.machine())
    print("\n".join(problems) or "the parameters are equal, bit for bit, and all in metrics.jsonl but times")
    return ExitCode.FAILED if problems else ExitCode.DONE


def _memory(steps: int) -> int:
    """Runs undisturbed, and prints the resident memory; returns the exit code."""
    every = max(steps // 10, 1)
    print(f"{contest.machine()}\n\n| step | resident memory |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        folder, due = Path(directory), every
        (folder / "config.py").write_text(CONFIG.format(steps=steps, saved_every=max(every // 10, 1)))
        (process,) = _start(folder, "long", 1)
        while process.poll() is None:
            seen = re.findall(r" step (\d+)/", _log(folder, "long").read_text())
            if seen and int(seen[-1]) >= due:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                print(f"| {seen[-1]} | {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB |", flush=True)
                due += every
            time.sleep(0.05)
        if process.returncode:
            print(_end_of_log(folder, "long"))
    return ExitCode.FAILED if process.returncode else ExitCode.DONE


def _disturb(folder: Path, count: int) -> str:
    """Starts the run, and ends it at some step after the last checkpoint; says how."""
    saved, log = _last_saved(folder), _log(folder, "disturbed")
    processes = _start(folder, "disturbed", count)
    # Before the first step, or up to two checkpoints later.
    at = saved + random.randrange(2 * SAVED_EVERY)
    pattern = re.compile(rf"step {at}/" if at > saved else r"devices \(data")
    end = time.monotonic() + DEADLINE
    while not pattern.search(log.read_text()) and all(p.poll() is None for p in processes):
        if time.monotonic() > end:
            raise RuntimeError(f"step {at} was not reached:\n{_end_of_log(folder, 'disturbed')}")
        time.sleep(0.01)
    number = random.choice((signal.SIGKILL, signal.SIGTERM))
    victims = random.choice(([0], [count - 1], range(count)))
    for i in victims:
        processes[i].send_signal(number)
    codes = _wait(processes)
    if number == signal.SIGTERM and (stopped := _last_saved(folder)) > at + STEPS_TO_STOP:
        raise RuntimeError(f"asked to stop at step {at}, the run ended at step {stopped} with {codes}")
    return f"{number.name} to {'all' if len(victims) == count else f'process {victims[0]}'}"


def _start(folder: Path, name: str, count: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_PLATFORMS": "cpu"}
    shared |= {"JAX_NUM_PROCESSES": str(count), "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    shared |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"}
    shared["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    words = [
        sys.executable,
        "-c",
        LAUNCHER,
        "train",
        f"--config={folder}/config.py",
        f"--run.directory={folder}/{name}",
    ]
    processes = []
    for i in range(count):
        with (_log(folder, name) if i == 0 else folder / f"{name}-{i}.log").open("w") as log:
            environment = os.environ | shared | {"JAX_PROCESS_ID": str(i)}
            processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    return processes


def _wait(processes: Sequence[subprocess.Popen[bytes]], steps: int = 0) -> list[int]:
    """The exit codes; a process that does not end, or make `steps` more, is killed, and named by its code."""
    end = time.monotonic() + DEADLINE + STEP_DEADLINE * steps
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _end_of_log(folder: Path, name: str) -> str:
    return "\n".join(_log(folder, name).read_text().splitlines()[-40:])


def _last_saved(folder: Path) -> int:
    steps = folder / "disturbed" / "checkpoints"
    found = [int(path.name) for path in steps.iterdir() if path.name.isdecimal()] if steps.is_dir() else []
    return max(found, default=0)


def logged(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without times."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith(TIMES_OF)} for line in lines]


def _last_step(folder: Path) -> int:
    file = folder / "disturbed" / "metrics.jsonl"
    return int(max((line["step"] for line in logged(file)), default=0)) if file.is_file() else 0


def _differences(folder: Path, codes: Sequence[int]) -> list[str]:
    """What is wrong with the disturbed run."""
    if any(codes):
        return [f"the last part of the disturbed run ended with {codes}:", _end_of_log(folder, "disturbed")]
    (_, expected), (_, found) = (load_parameters(folder / name) for name in ("undisturbed", "disturbed"))
    other = [name for name, value in expected.items() if not np.array_equal(value, found[name])]
    problems = [f"{len(other)} of {len(expected)} parameters differ, such as {other[0]}"] if other else []
    return problems + differing_lines(
        *(logged(folder / name / "metrics.jsonl") for name in ("undisturbed", "disturbed"))
    )


def differing_lines(expected: Sequence[dict[str, float]], found: Sequence[dict[str, float]]) -> list[str]:
    """What is wrong with the lines of a metrics.jsonl: at most one message, of the first line."""
    for number, (line, other) in enumerate(zip_longest(expected, found), 1):
        if line != other:
            return [f"metrics.jsonl, line {number}: expected {line}, found {other}"]
    return []


main = command("asymvq benchmark endurance", Endurance, work)
