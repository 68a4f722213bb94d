"""The loop: what a run writes, how it ends, and that a killed run resumes to the very same parameters."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from asymvq_jax.commands import train as command
from asymvq_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from asymvq_jax.devices import cluster
from asymvq_jax.errors import CheckpointError, ConfigError, NonFiniteError
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, load_parameters, save_model
from asymvq_jax.training.loop import EXIT_PREEMPTED, Run, train

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1)


def _config(folder: Path, **changes) -> Config:
    run = {"directory": str(folder / "run"), "init_from": str(folder / "first"), "steps": 6, "log_every": 2}
    run |= {"eval_every": 3, "eval_pictures": 8, "keep": 1}
    return Config(
        run=RunConfig(**(run | changes)),
        model=MODEL,
        loss=LossConfig(gan_start=3, perceptual_weight=0.0, discriminator_features=8),
        data=DataConfig(image_size=32, batch_size=8),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, ema_decay=0.5),
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a plain autoencoder to start from."""
    folder = tmp_path_factory.mktemp("training")
    plain = dataclasses.replace(MODEL, condition=False)
    save_model(folder / "first", Autoencoder(plain, rngs=nnx.Rngs(0)))
    return folder


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax 0.2.8 raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(first):
    with jax.numpy_dtype_promotion("standard"):
        assert train(_config(first)) == 0
    return first / "run"


def test_a_run_leaves_metrics_pictures_and_the_last_and_best_checkpoints(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "l1" in r] == [2, 3, 4, 6]
    for name in ("grad_norm", "update_norm", "param_norm", "discriminator_grad_norm", "adaptive_weight",
                 "images_per_second", "input_wait_share"):  # fmt: skip
        assert np.isfinite(records[-2][name])
    held_out = [r for r in records if "held_out/nll" in r]
    assert [r["step"] for r in held_out] == [3, 6]
    assert images.read(finished / "pictures" / "00000006.png").shape[1] == 5 * 4 * 32 + 4 * 4
    assert list((finished / "tensorboard").glob("events*"))
    best = min(held_out, key=lambda r: r["held_out/nll"])["step"]
    kept = {p.name for p in (finished / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {str(best), "6"}


def test_the_averaged_parameters_are_what_inference_reads(finished):
    _, averaged = load_parameters(finished)
    assert load_model(finished).config == MODEL
    _, start = load_parameters(finished.parent / "first")
    np.testing.assert_array_equal(averaged["encoder.conv_in.kernel"], start["encoder.conv_in.kernel"])
    assert (averaged["decoder.conv_in.kernel"] != start["decoder.conv_in.kernel"]).any()


def test_a_finished_run_ends_at_once_and_a_longer_one_continues_on_another_mesh(finished):
    assert train(_config(finished.parent)) == 0
    longer = dataclasses.replace(_config(finished.parent, steps=7), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert train(longer) == 0
    assert (finished / "checkpoints" / "7").is_dir()


def test_another_configuration_is_refused(finished):
    other = dataclasses.replace(_config(finished.parent), model=dataclasses.replace(MODEL, decoder_blocks=2))
    with pytest.raises(CheckpointError, match=r"another configuration: model\.decoder_blocks=2 \(there 1\)"):
        train(other)


def test_a_diverged_run_stops_with_the_step(first):
    config = _config(first, directory=str(first / "diverged"))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(base_learning_rate=1e36, warmup_steps=0))
    with pytest.raises(NonFiniteError, match=r"step \d+: .* not finite; there is no checkpoint yet"):
        train(config)


def test_too_little_memory_is_explained(first, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    monkeypatch.setattr(Run, "to_the_end", exhausted)
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 needs more memory .* 9 bytes\. Raise --optimizer"):
        train(_config(first, directory=str(first / "exhausted")))


def _command(folder: Path, name: str, *extra: str) -> list[str]:
    config = folder / f"{name}.py"
    text = "import sys\nfrom pathlib import Path\nsys.path.insert(0, {!r})\nfrom test_training import _config\n"
    text += "def get_config():\n    return _config(Path({!r}), directory={!r}, steps=9)\n"
    config.write_text(text.format(str(ROOT / "tests"), str(folder), str(folder / name)))
    return [sys.executable, str(ROOT / "train.py"), f"--config={config}", *extra]


def _start(folder: Path, name: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "XLA_FLAGS": ""}
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(_command(folder, name), env=environment, stdout=log, stderr=log)


def _wait_for(process: subprocess.Popen, happened) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_runs_resume_to_identical_parameters(first):
    whole = _start(first, "whole")
    assert whole.wait() == 0
    steps = first / "killed" / "checkpoints"

    # In the midst of writing the first checkpoint: its temporary directory is there, the checkpoint is not.
    process = _start(first, "killed")
    _wait_for(process, lambda: steps.is_dir() and any("tmp" in p.name for p in steps.iterdir()))
    process.send_signal(signal.SIGKILL)
    process.wait()

    # After a complete checkpoint, with steps on the way to the next.
    process = _start(first, "killed")
    _wait_for(process, lambda: (steps / "3").is_dir())
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()

    # SIGTERM, as a preempted machine sends it, as soon as the run is under way again.
    log = first / "killed.log"
    process = _start(first, "killed")
    _wait_for(
        process,
        lambda: log.read_text().count("resuming") >= 1 and "devices (data" in log.read_text().rpartition("resuming")[2],
    )
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    assert code == EXIT_PREEMPTED
    assert "told to stop: saved step" in log.read_text()

    assert _start(first, "killed").wait() == 0
    _, expected = load_parameters(first / "whole")
    _, resumed = load_parameters(first / "killed")
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    lines = (first / "killed" / "metrics.jsonl").read_text().splitlines()
    reported = [r["step"] for r in map(json.loads, lines) if "l1" in r]
    assert reported == sorted(set(reported))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--run.init_from=nowhere"], "error: no checkpoint at nowhere"),
        (["--data.source=folder", "--data.path=nowhere"], "error: data.path='nowhere' does not exist"),
        (["--mesh.data=3"], "error: mesh (data, fsdp, tensor)=(3, 1, 1) does not fit"),
        (["--model.latent_channels=8"], "holds another encoder: model.latent_channels=8 (there 4)"),
        (["--model.widths=8"], "error: --model.widths is not a field of the configuration"),
        (["--run.directory={file}/run"], "is not writable"),
    ],
)
def test_bad_input_ends_before_training_with_one_line(first, tmp_path, overrides, message, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    overrides = [o.format(file=tmp_path / "file") for o in overrides]
    monkeypatch.setattr(sys, "argv", _command(first, "bad", *overrides)[1:])
    # This process has used its devices already, and can join no others.
    monkeypatch.setattr(cluster, "join", lambda: None)
    assert command.main() == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(message), error), error
