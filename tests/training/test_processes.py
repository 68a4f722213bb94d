"""Runs of two real processes: the same numbers as one, and what is left when one of them, or the disk, fails."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from processes import DEADLINE, ROOT, write_config

from asymvq_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from asymvq_jax.devices import cluster
from asymvq_jax.errors import ConfigError, ExitCode, UserError
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_parameters, save_model
from asymvq_jax.training.loop import train
from benchmarks import endurance

# Large enough that a step takes more space than a picture does.
MODEL = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1)
# Starts train.py, whose collectives listen on the host's own name otherwise; FILE_SIZE stands for a full disk.
LAUNCHER = """
import functools, os, resource, runpy, sys
from jaxlib import _jax
_jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
if "FILE_SIZE" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE"]),) * 2)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _config(folder: Path, name: str) -> Config:
    run = {"directory": str(folder / name), "init_from": str(folder / "first"), "steps": 6, "log_every": 1}
    return Config(
        run=RunConfig(**run, eval_every=3, eval_pictures=8, keep=2),
        model=MODEL,
        loss=LossConfig(gan_start=0, perceptual_weight=0.0, discriminator_features=8, discriminator_layers=1),
        data=DataConfig(image_size=32, batch_size=8),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, ema_decay=0.5),
    )


def cluster_of(processes: int) -> dict[str, str]:
    """The variables that all of them share; JAX_PROCESS_ID is each one's own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
    return variables | {"JAX_NUM_PROCESSES": str(processes)}


class Started:
    """Processes that train together, each with a log; `alone` has variables of single ones."""

    def __init__(
        self, folder: Path, name: str, *overrides: str, processes: int = 2, devices: int = 1, alone=None, **variables
    ):
        config = write_config(folder / f"{name}.py", _config(folder, name))
        command = [sys.executable, "-c", LAUNCHER, str(ROOT / "train.py"), f"--config={config}", *overrides]
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        variables |= {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        if processes > 1:
            variables |= cluster_of(processes)
        self.logs = [folder / f"{name}-{len(list(folder.glob('*.log')))}-{i}.log" for i in range(processes)]
        self.processes = []
        for i, path in enumerate(self.logs):
            environment = os.environ | variables | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {})
            environment |= (alone or {}).get(i, {})
            with path.open("w") as log:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def texts(self) -> list[str]:
        return [path.read_text() for path in self.logs]

    def wait_for(self, text: str, processes: int = 2) -> None:
        """Until the logs of the first `processes` have `text`."""
        end = time.monotonic() + DEADLINE
        while not all(text in log for log in self.texts()[:processes]):
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self._kill()
                pytest.fail(f"not found: {text}\n" + "\n".join(self.texts()))
            time.sleep(0.01)

    def codes(self) -> list[int]:
        """Every process's exit code."""
        try:
            return [process.wait(DEADLINE) for process in self.processes]
        finally:
            self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same six steps by one process with two devices ("one") and by two processes with one each ("two")."""
    folder = tmp_path_factory.mktemp("processes")
    model = Autoencoder(dataclasses.replace(MODEL, condition=False), rngs=nnx.Rngs(0))
    save_model(folder / "first", model)
    runs = [Started(folder, "one", processes=1, devices=2), Started(folder, "two")]
    assert [run.codes() for run in runs] == [[0], [0, 0]], [run.texts() for run in runs]
    return folder


def _records(folder: Path, name: str) -> list[dict[str, float]]:
    # The loss is a small difference of large terms.
    lines = endurance.logged(folder / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "loss"} for line in lines]


def _equal_records(records: list[dict[str, float]], reference: list[dict[str, float]]) -> None:
    """The records are those that the reference begins with, but for rounding."""
    for record, expected in zip(records, reference, strict=False):
        assert record == pytest.approx(expected, rel=2e-3)


def _steps(folder: Path, name: str) -> set[str]:
    return {path.name for path in (folder / name / "checkpoints").iterdir() if path.name.isdigit()}


def test_two_processes_train_as_one_does(folder):
    one, two = _records(folder, "one"), _records(folder, "two")
    assert [r["step"] for r in two] == [1, 2, 3, 3, 4, 5, 6, 6]
    _equal_records(two, one)
    _, start = load_parameters(folder / "first")
    (_, expected), (_, parameters) = load_parameters(folder / "one"), load_parameters(folder / "two")
    # Biases before a normalisation have no gradient but rounding errors, which Adam makes whole steps of.
    trained = [n for n in expected if n.startswith("decoder.") and n.endswith(".kernel") and n in start]
    for name in trained:
        moved = np.linalg.norm(expected[name] - start[name])
        assert np.linalg.norm(parameters[name] - expected[name]) < 0.01 * moved, name
    pictures = [images.read(folder / name / "pictures" / "00000006.png") for name in ("one", "two")]
    np.testing.assert_allclose(*(p.astype(int) for p in pictures), atol=8)


def test_runs_that_were_stopped_killed_or_out_of_space_resume_to_identical_parameters(folder):
    # SIGTERM for one process, before its first step.
    run = Started(folder, "broken")
    run.wait_for("devices (data")
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.codes() == [ExitCode.SAVED] * 2, run.texts()
    saved = {re.search(r"asked to stop: saved step (\d+)", text)[1] for text in run.texts()}
    assert saved == _steps(folder, "broken")
    assert saved <= set("12345")

    # SIGKILL for one process, a step later: the other ends by itself, and the checkpoint is still there. With process 0
    # goes the service through which they know of each other.
    for victim in (1, 0):
        run = Started(folder, "broken")
        run.wait_for(f"resuming {folder / 'broken'} at step {min(saved)}")
        run.wait_for(f"step {int(min(saved)) + 1}/6", processes=1)
        run.processes[victim].kill()
        codes = run.codes()
        assert codes[victim] == -signal.SIGKILL
        # JAX's own watchdog may notice first, and abort with a message of its own.
        assert codes[1 - victim] in (ExitCode.LOST_PEER, -signal.SIGABRT), run.texts()
        if codes[1 - victim] == ExitCode.LOST_PEER:
            text = run.texts()[1 - victim]
            assert "error: a computation of all processes failed: " in text
            assert f"resume from the last checkpoint in {folder / 'broken'}" in text
            assert "Traceback" not in text
    assert saved <= _steps(folder, "broken")

    # No space for the next checkpoint; meanwhile on another
    # mesh, where both processes hold the same rows of the batch.
    before = _steps(folder, "broken")
    # Pictures are smaller than the limit, and what each process writes of a step is larger. What is compiled must not
    # be cut off in the cache that all tests share.
    limit = {"FILE_SIZE": "150000", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    run = Started(folder, "broken", "--mesh.tensor=2", **limit)
    assert run.codes() == [2, 2], run.texts()
    for text in run.texts():
        # Threads of TensorBoard and TensorStore may have printed their own errors before.
        (message,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert f"run.directory='{folder / 'broken'}': a checkpoint cannot be written: " in message
    assert _steps(folder, "broken") == before
    load_parameters(folder / "broken")
    _equal_records(_records(folder, "broken"), _records(folder, "two"))

    assert Started(folder, "broken").codes() == [0, 0]
    (_, expected), (_, resumed) = load_parameters(folder / "two"), load_parameters(folder / "broken")
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert [r["step"] for r in _records(folder, "broken") if "l1" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("index", "size", "told"),
    [
        # Its part of a step fails in the background, where Orbax's threads wait for each other.
        (1, "150000", "a checkpoint cannot be written: that of process 1, whose log says why"),
        # The file of metrics fails, which it alone writes; the other is in the computation of a later step.
        (0, "20000", "/metrics.jsonl cannot be written: [Errno 27] File too large"),
    ],
)
def test_a_full_disk_of_one_process_ends_the_others_at_once(folder, index, size, told):
    every = {0: 100_000, 1: 3}[index]
    limit = {"FILE_SIZE": size, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    run = Started(folder, f"full{index}", "--run.steps=100000", f"--run.eval_every={every}", alone={index: limit})
    assert run.codes() == [2, 2], run.texts()
    messages = [[line for line in text.splitlines() if line.startswith("error: ")] for text in run.texts()]
    assert "File too large" in messages[index][0]
    assert told in messages[1 - index][0]


def test_four_processes_save_once_and_at_the_same_step(folder):
    run = Started(folder, "four", "--run.steps=100000", "--run.eval_every=100000", processes=4)
    run.wait_for("devices (data", processes=4)
    run.processes[2].send_signal(signal.SIGTERM)
    assert run.codes() == [ExitCode.SAVED] * 4, run.texts()
    saved = [re.findall(r"asked to stop: saved step (\d+)", text) for text in run.texts()]
    assert saved == [saved[0]] * 4
    assert len(saved[0]) == 1
    assert _steps(folder, "four") == set(saved[0])
    load_parameters(folder / "four")


def test_a_run_continues_in_one_process_on_another_mesh(folder):
    shutil.copytree(folder / "two", folder / "alone")
    shutil.rmtree(folder / "alone" / "checkpoints" / "6")
    config = dataclasses.replace(_config(folder, "alone"), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.numpy_dtype_promotion("standard"):
        assert train(config) == 0
    assert len(_records(folder, "alone")) == 8
    _equal_records(_records(folder, "alone"), _records(folder, "two"))


def test_a_process_that_does_not_go_on_is_named_and_the_others_end(folder):
    run = Started(folder, "stuck", "--run.wait_limit=20", "--run.steps=100000", "--run.eval_every=100000")
    run.wait_for("step 2/", processes=1)
    run.processes[1].send_signal(signal.SIGSTOP)
    try:
        assert run.processes[0].wait(DEADLINE) == ExitCode.LOST_PEER, run.texts()
    finally:
        run.processes[1].kill()
        run.codes()
    text = run.texts()[0]
    assert "process 1 has not arrived (last at " in text
    assert "longer than run.wait_limit=20; start all processes again to resume" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--run.seed=1"], "holds a run of another configuration: run.seed=1 (there 0)"),
        (["--run.directory={folder}/two.py/run"], "is not writable"),
    ],
)
def test_all_processes_refuse_bad_input_with_one_line(folder, overrides, message):
    run = Started(folder, "two", *[o.format(folder=folder) for o in overrides])
    assert run.codes() == [2, 2], run.texts()
    for text in run.texts():
        assert message in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "'localhost' is not host:port. Set JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:70000"}, "'localhost:70000' is not host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:{used}"}, "process 0 cannot listen on port {used} of this machine"),
        ({"JAX_PROCESS_ID": "first"}, "invalid literal for int"),
    ],
)
def test_join_refuses_what_would_crash(variables, message, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        told = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"} | variables
        for name, value in told.items():
            monkeypatch.setenv(name, value.format(used=used))
        with pytest.raises(ConfigError, match=re.escape(message.format(used=used))):
            cluster.join()


@pytest.mark.parametrize("value", [["a", "b\udcff"], "no pictures"])
def test_what_the_first_process_finds_is_known_to_all(value, monkeypatch):
    wire = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def broadcast(array):
        if jax.process_index() == 0:
            wire.append(array)
            return array
        return wire.pop(0)

    def work():
        if isinstance(value, str):
            raise ConfigError(value)
        return value

    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        if isinstance(value, str):
            with pytest.raises(UserError, match=value):
                cluster.from_first(work if index == 0 else None)
        else:
            assert cluster.from_first(work if index == 0 else None) == value


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, (2, 3)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, (1, 4)),
        # An interactive allocation of four tasks, of which this is the one.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, (1, 2)),
        ({"JAX_NUM_PROCESSES": "3"}, "Set JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "3"}, "an index from 0 to below it"),
        ({"JAX_NUM_PROCESSES": "three", "JAX_PROCESS_ID": "3"}, "an index from 0 to below it"),
    ],
)
def test_share_of_independent_processes(variables, expected, monkeypatch):
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    updates = {}
    monkeypatch.setattr("jax.config.update", updates.__setitem__)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            cluster.share()
        return
    assert cluster.share() == expected
    local = [value for name, value in variables.items() if "LOCAL" in name and expected != (0, 1)]
    assert list(updates.values()) == local * 2


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            [
                "error: cannot find the other processes",
                "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID",
            ],
        ),
        # Open MPI 5 does not set the variable by which JAX recognises it.
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            ["error: there are 2 processes, and JAX cannot find the others: set JAX_COORDINATOR"],
        ),
    ],
)
def test_a_process_that_cannot_find_the_others_says_what_it_needs(folder, variables, messages):
    run = Started(folder, "two", processes=1, **variables)
    assert run.codes() == [2]
    for message in messages:
        assert message in run.texts()[0]
