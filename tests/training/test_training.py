"""The loop: what a run writes, how it ends, and that a killed run resumes to the very same parameters."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from processes import ROOT, write_config

from asymvq_jax.commands import train as command
from asymvq_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from asymvq_jax.convert.convert import convert
from asymvq_jax.devices import cluster, sharding
from asymvq_jax.errors import CheckpointError, ConfigError, ExitCode, NonFiniteError, OutputError
from asymvq_jax.files import images
from asymvq_jax.files.locks import only_owner
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, load_parameters, save_model
from asymvq_jax.training import checkpoints, loop
from asymvq_jax.training.clock import KINDS
from asymvq_jax.training.loop import Run, train
from asymvq_jax.training.signals import stop_requests
from asymvq_jax.training.state import create_state, make_blueprint

MODEL = ModelConfig(
    encoder_channels=(8, 8), decoder_channels=(8, 8), encoder_blocks=1, decoder_blocks=1, norm_groups=4,
    mid_attention=False,
)  # fmt: skip


def _config(folder: Path, **changes) -> Config:
    run = {"directory": str(folder / "run"), "init_from": str(folder / "first"), "steps": 6, "log_every": 2}
    run |= {"eval_every": 3, "eval_pictures": 8, "keep": 1}
    return Config(
        run=RunConfig(**(run | changes)),
        model=MODEL,
        loss=LossConfig(gan_start=3, perceptual_weight=0.0, discriminator_features=4, discriminator_layers=1),
        data=DataConfig(image_size=32, batch_size=8),
        # A rate that does not depend on run.steps: runs of any length share one compiled step.
        optimizer=OptimizerConfig(base_learning_rate=1e-4, schedule="constant", warmup_steps=2, ema_decay=0.5),
    )


def _with_a_cosine(folder: Path, name: str, **changes) -> Config:
    config = _config(folder, directory=str(folder / name), **changes)
    optimizer = dataclasses.replace(config.optimizer, schedule="cosine")
    return dataclasses.replace(config, optimizer=optimizer, loss=dataclasses.replace(config.loss, gan_start=2))


def _too_fast(config: Config) -> Config:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, base_learning_rate=1e36))


@pytest.fixture(scope="module")
def first(tmp_path_factory, shared_programs):
    """A folder with a plain autoencoder to start from."""
    folder = tmp_path_factory.mktemp("training")
    plain = dataclasses.replace(MODEL, condition=False)
    save_model(folder / "first", Autoencoder(plain, rngs=nnx.Rngs(0)))
    return folder


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def finished(first):
    with jax.numpy_dtype_promotion("standard"):
        assert train(_config(first)) == 0
    return first / "run"


def test_a_run_leaves_metrics_pictures_and_the_last_and_best_checkpoints(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "l1" in r] == [2, 3, 4, 6]
    for name in ("grad_norm", "update_norm", "param_norm", "discriminator_grad_norm", "adaptive_weight",
                 "learning_rate", "images_per_second", "input_wait_share"):  # fmt: skip
        assert np.isfinite(records[-2][name])
    held_out = [r for r in records if "held_out/nll" in r]
    assert [r["step"] for r in held_out] == [3, 6]
    assert images.read(finished / "pictures" / "00000006.png").shape[1] == 5 * 4 * 32 + 4 * 4
    assert list((finished / "tensorboard").glob("events*"))
    best = min(held_out, key=lambda r: r["held_out/nll"])["step"]
    kept = {p.name for p in (finished / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {str(best), "6"}


@pytest.mark.parametrize("least", [checkpoints.MIN_SLICE_BYTES, 256])
def test_a_save_slices_no_array_into_less_than_the_least(first, least, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MIN_SLICE_BYTES", least)
    slices, slice_in_dim = [], jax.lax.slice_in_dim

    def counted(*arguments, **options):
        slices.append(slice_in_dim(*arguments, **options))
        return slices[-1]

    config = _config(first, directory=str(tmp_path / "run"))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = create_state(make_blueprint(config), mesh)
        saved = checkpoints.RunCheckpoints(config)
        monkeypatch.setattr(jax.lax, "slice_in_dim", counted)
        saved.save(state, {"iterator": {}, "seconds": 0.0, "inputs": {}})
        saved.close(together=True)
    assert all(x.nbytes >= least for x in slices)
    # Orbax takes its slices by this function.
    assert slices or least > 256


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
    for field, value in (("seed", 1), ("train_encoder", True)):
        with pytest.raises(CheckpointError, match=rf"another configuration: run\.{field}={value} \(there"):
            train(_config(finished.parent, **{field: value}))


def test_a_diverged_run_stops_with_the_step(first):
    with pytest.raises(NonFiniteError, match=r"step \d+: .* not finite; there is no checkpoint yet"):
        train(_too_fast(_config(first, directory=str(first / "diverged"))))


def test_too_little_memory_is_explained(first, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    monkeypatch.setattr(Run, "to_the_end", exhausted)
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 needs more memory .* 9 bytes\. Raise --optimizer"):
        train(_config(first, directory=str(first / "exhausted")))


def _records(folder: Path, name: str) -> list[dict]:
    """The lines of training metrics, by a parser that takes JSON alone."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [record for record in records if "l1" in record and "seconds" in record]


@pytest.fixture(scope="module")
def logged(first):
    """Four steps with a line for each ("each"), and the same with a line for every two ("pairs")."""
    with jax.numpy_dtype_promotion("standard"):
        for name, every in (("each", 1), ("pairs", 2)):
            assert train(_with_a_cosine(first, name, steps=4, log_every=every, eval_every=4)) == 0
    return first


def test_logged_metrics_are_means_over_the_interval(logged):
    each, pairs = _records(logged, "each"), _records(logged, "pairs")
    assert [record["step"] for record in pairs] == [2, 4]
    for record, steps in zip(pairs, (each[:2], each[2:]), strict=True):
        for name in ("l1", "nll", "grad_norm"):
            values = [step[name] for step in steps]
            assert record[name] == pytest.approx(np.mean(values), rel=1e-5)
            assert record[name] != pytest.approx(values[-1], rel=1e-5)


def test_the_discriminator_starts_after_gan_start_steps_and_learns(logged):
    records = _records(logged, "each")
    assert [record["step"] for record in records if "adaptive_weight" in record] == [3, 4]
    assert all(record["discriminator_update_norm"] > 0 for record in records[2:])
    norms = [record["discriminator_param_norm"] for record in records[2:]]
    assert norms[0] != norms[1]


def test_images_per_second_and_the_learning_rate_are_logged(logged):
    records = _records(logged, "each")
    for before, after in itertools.pairwise(records):
        # The batch of 8, by the time between two lines, in which nothing else was done.
        speed = 8 / (after["seconds"] - before["seconds"])
        assert after["images_per_second"] == pytest.approx(speed, rel=1e-3)
    # 1e-4 x 8, after two steps of warm-up from 1 %; then a cosine down to 1e-6 at step 4.
    expected = [8e-6, (8e-6 + 8e-4) / 2, 8e-4, (8e-4 + 1e-6) / 2]
    assert [record["learning_rate"] for record in records] == pytest.approx(expected, rel=1e-5)


def test_named_steps_are_traced_and_the_run_says_where_its_time_went(first, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e12)
    config = _config(first, directory=str(first / "traced"), steps=4, log_every=2, eval_every=4, profile_steps="1:3")
    assert train(config) == 0
    (file,) = (first / "traced" / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"]
    assert {dict(event.stats)["step_num"] for event in events} == {2, 3}
    lines = [json.loads(line) for line in (first / "traced" / "metrics.jsonl").read_text().splitlines()]
    report, evaluation = lines[-2:]
    assert 0 < report["mfu"] < 1
    assert 0 < report["step_seconds/p50"] <= report["step_seconds/p95"] <= report["step_seconds/max"]
    assert 0 < report["goodput"] < 1
    spent = {name.removeprefix("spent/"): value for name, value in evaluation.items() if name.startswith("spent/")}
    assert set(spent) == {*KINDS}
    assert spent["compile"] > 0
    assert spent["start"] > 0
    assert sum(spent.values()) >= report["seconds"]
    # Again, as after a kill: what was logged beyond the last checkpoint is lost.
    shutil.rmtree(first / "traced" / "checkpoints" / "4")
    assert train(config) == 0
    again = json.loads((first / "traced" / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["spent/lost"] == pytest.approx(report["seconds"])


@pytest.mark.parametrize("steps", ["3", "3:3", "5:3", "a:b"])
def test_steps_to_trace_that_are_none_are_refused(first, steps):
    with pytest.raises(ConfigError, match=r"run\.profile_steps=.*expected START:END"):
        _config(first, profile_steps=steps)


def test_damaged_lines_of_the_metrics_are_left_out_and_counted(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "l1": 0.5}\n{"step": 2, "l1": NaN}\n3\n\xff\xfe\n{"step": 4}\n{"step": 9}\n{"st')
    log = loop.RunLog(epath.Path(tmp_path), step=4, steps=10, active=True)
    assert "metrics.jsonl: 3 damaged lines are left out" in caplog.text
    log.metrics(5, {"l1": float("nan"), "nll": float("inf"), "lpips": 0.5}, "")
    log.close()
    records = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert records == [{"step": 1, "l1": 0.5}, {"step": 4}, {"step": 5, "l1": None, "nll": None, "lpips": 0.5}]


def test_a_step_that_has_diverged_is_not_saved_and_the_last_good_one_stays(first):
    name = "good"
    assert train(_config(first, directory=str(first / name), steps=2)) == 0
    too_fast = _too_fast(_config(first, directory=str(first / name), steps=3))
    with pytest.raises(NonFiniteError, match=r"step 3: .*not finite; the last good checkpoint is step 2"):
        train(too_fast)
    assert [p.name for p in (first / name / "checkpoints").iterdir()] == ["2"]
    assert all(np.isfinite(x).all() for x in load_parameters(first / name)[1].values())


@pytest.mark.parametrize("what", ["held-out nll", "parameters"])
def test_a_step_is_saved_only_if_its_figures_and_its_state_are_finite(first, monkeypatch, what):
    if what == "parameters":
        monkeypatch.setattr(loop, "all_finite", lambda _: False)
    else:
        validate = Run._validate
        monkeypatch.setattr(Run, "_validate", lambda self, step: validate(self, step) | {"nll": float("nan")})
    with pytest.raises(NonFiniteError, match=rf"step 3: {what} not finite; there is no checkpoint yet"):
        train(_config(first, directory=str(first / what), steps=3))


def test_a_second_run_in_a_directory_is_refused(first):
    config = _config(first, directory=str(first / "taken"))
    (first / "taken" / "checkpoints").mkdir(parents=True)
    with (
        only_owner(first / "taken" / "checkpoints", "run"),
        pytest.raises(OutputError, match=r"another run is writing .*taken"),
    ):
        train(config)


def _folder_run(first: Path, name: str, **changes) -> Config:
    """A run on 40 pictures of its own."""
    pictures = first / f"{name}_pictures"
    rng = np.random.default_rng(0)
    if not pictures.exists():
        pictures.mkdir()
        for i in range(40):
            images.write(pictures / f"{i:02d}.png", rng.integers(0, 255, (32, 32, 3), np.uint8))
    config = _config(first, directory=str(first / name), **changes)
    return dataclasses.replace(config, data=DataConfig(source="folder", path=pictures, image_size=32, batch_size=8))


def test_pictures_that_come_and_go_between_two_halves_of_a_run_are_told(first, caplog):
    assert train(_folder_run(first, "folder", steps=1, eval_every=1)) == 0
    caplog.clear()
    assert train(_folder_run(first, "folder", steps=2, eval_every=1)) == 0
    assert "pictures have changed" not in caplog.text
    pictures = first / "folder_pictures"
    (pictures / "00.png").rename(pictures / "later.png")
    (pictures / "01.png").unlink()
    assert train(_folder_run(first, "folder", steps=3, eval_every=1)) == 0
    told = re.search(
        r"the training pictures have changed: (\d+) pictures \(digest \w+\) now, (\d+) pictures", caplog.text
    )
    assert int(told[1]) < int(told[2])


def test_a_run_resumes_without_its_first_stage_and_refuses_another(first, caplog):
    convert(first / "first", first / "gone", "diffusers")
    changes = {"directory": str(first / "orphan"), "init_from": str(first / "gone")}
    assert train(_config(first, steps=1, **changes)) == 0
    shutil.rmtree(first / "gone")
    assert train(_config(first, steps=2, **changes)) == 0
    assert "gone' cannot be read (no checkpoint at" in caplog.text
    assert "lack the column 'plain decode'" in caplog.text
    # The same encoder, whatever the form.
    convert(first / "first", first / "original.safetensors", "ldm")
    for same in ("first", "original.safetensors"):
        assert train(_config(first, steps=2, **changes | {"init_from": str(first / same)})) == 0
    save_model(first / "gone", Autoencoder(dataclasses.replace(MODEL, condition=False), rngs=nnx.Rngs(1)))
    with pytest.raises(
        CheckpointError, match=r"gone' holds another encoder \(digest \w+\) than the one that .*restore"
    ):
        train(_config(first, steps=3, **changes))


def test_a_schedule_that_jumps_on_extending_is_told(logged, caplog):
    shutil.copytree(logged / "each", logged / "longer")
    assert train(_with_a_cosine(logged, "longer", steps=5)) == 0
    told = re.search(
        r"rate of the next step is (\S+), where the run so far would have had 1e-06: run.steps=5", caplog.text
    )
    assert float(told[1]) > 1e-4


@pytest.mark.parametrize("field", ["scaling_factor", "shift_factor"])
def test_another_latent_is_refused_on_resuming(finished, field):
    model = dataclasses.replace(MODEL, **{field: 0.5})
    with pytest.raises(CheckpointError, match=rf"another configuration: model\.{field}=0\.5 \(there"):
        train(dataclasses.replace(_config(finished.parent), model=model))


def test_ctrl_c_finishes_the_step_saves_and_ends_with_130(first, monkeypatch, caplog):
    caplog.set_level("INFO")
    next_batch = Run._next_batch

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return next_batch(self)

    monkeypatch.setattr(Run, "_next_batch", interrupted)
    assert train(_config(first, directory=str(first / "interrupted"))) == ExitCode.INTERRUPTED == 130
    assert "asked to stop: saved step 2" in caplog.text
    assert (first / "interrupted" / "checkpoints" / "2").is_dir()


def test_ctrl_c_ends_at_once_before_the_first_step_and_the_second_time():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests() as ask:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert ask() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert ask() == ExitCode.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_requests() as ask:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ask() == ExitCode.SAVED == 75
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def _command(folder: Path, name: str, *extra: str) -> list[str]:
    config = write_config(folder / f"{name}.py", _long(folder, name))
    return [sys.executable, str(ROOT / "train.py"), f"--config={config}", *extra]


def _long(folder: Path, name: str) -> Config:
    """Long enough for several deaths."""
    return _config(folder, directory=str(folder / name), steps=60, log_every=1, eval_every=15)


def _start(folder: Path, name: str) -> subprocess.Popen:
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(_command(folder, name), stdout=log, stderr=log)


def _wait_for(process: subprocess.Popen, happened) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_killed_runs_resume_to_identical_parameters(first):
    assert train(_long(first, "whole")) == 0
    steps, log = first / "killed" / "checkpoints", first / "killed.log"

    # In the midst of writing the first checkpoint: its temporary directory is there, the checkpoint is not.
    process = _start(first, "killed")
    _wait_for(process, lambda: steps.is_dir() and any("tmp" in p.name for p in steps.iterdir()))
    process.send_signal(signal.SIGKILL)
    process.wait()

    # After a complete checkpoint, with steps on the way to the next.
    process = _start(first, "killed")
    _wait_for(process, lambda: (steps / "15").is_dir() and "step 17/" in log.read_text().rpartition("config:")[2])
    process.send_signal(signal.SIGKILL)
    process.wait()

    # SIGTERM, as a preempted machine sends it, as soon as the run is under way again.
    process = _start(first, "killed")
    _wait_for(
        process, lambda: "devices (data" in log.read_text().rpartition("resuming")[2] and "resuming" in log.read_text()
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait() == ExitCode.SAVED
    assert "asked to stop: saved step" in log.read_text()

    assert train(_long(first, "killed")) == 0
    _, expected = load_parameters(first / "whole")
    _, resumed = load_parameters(first / "killed")
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    reported = [record["step"] for record in _records(first, "killed")]
    assert reported == sorted(set(reported))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--run.init_from=nowhere"], "error: run.init_from='nowhere': no checkpoint at nowhere"),
        (["--data.source=folder", "--data.path=nowhere"], "error: data.path='nowhere' does not exist"),
        # The first stage comes first: listing a data set may take long.
        (["--run.init_from=nowhere", "--data.source=folder", "--data.path=nowhere"], "error: run.init_from='nowhere'"),
        (["--mesh.data=3"], "error: mesh (data, fsdp, tensor)=(3, 1, 1) does not fit"),
        (["--model.latent_channels=8"], "holds another encoder: model.latent_channels=8 (there 4)"),
        (["--model.widths=8"], "error: --model.widths is not a field of the configuration"),
        (["--run.directory={file}/run"], "is not writable"),
        (
            ["--run.directory=gs://bucket/run"],
            "run.directory='gs://bucket/run' needs the package gcsfs; install it with",
        ),
        (["--run.directory=http://host/run"], "expected a path of this machine, or an address that begins with gs://"),
        (["--data.source=folder", "--data.path=gs://bucket/p"], "data.path='gs://bucket/p' needs the package gcsfs"),
        (
            ["--data.source=tfds", "--data.path=p", "--data.data_dir=gs://b/p"],
            "data.data_dir='gs://b/p' needs the package",
        ),
        (["--run.init_from=gs://bucket/run"], "needs the package gcsfs"),
    ],
)
def test_bad_input_ends_before_training_with_one_line(first, tmp_path, overrides, message, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    overrides = [o.format(file=tmp_path / "file") for o in overrides]
    monkeypatch.setattr(sys, "argv", _command(first, "bad", *overrides)[1:])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest))
    # This process has used its devices already, and can join no others.
    monkeypatch.setattr(cluster, "join", lambda: None)
    assert command.main() == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(message), error), error
    assert not (first / "bad").exists()
