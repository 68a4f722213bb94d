"""A hundred damaged runs: each resumes as it was, or is refused with one line; never a wrong number, or a traceback."""

import functools
import json
import random
import re
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
from fuzzing import TIMES, tell
from jax.experimental import multihost_utils
from processes import write_config

from asymvq_jax.commands import train as command
from asymvq_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from asymvq_jax.devices import sharding
from asymvq_jax.errors import CheckpointError, OutputError
from asymvq_jax.models.checkpoints import load_parameters
from asymvq_jax.training.checkpoints import RunCheckpoints
from asymvq_jax.training.logs import RunLog
from asymvq_jax.training.loop import train
from asymvq_jax.training.state import abstract_state, make_blueprint

COUNT = 100 * TIMES
ITEMS = ("config", "model", "training", "progress")


def _config(directory, **changes) -> Config:
    run = {"directory": directory, "steps": 2, "train_encoder": True, "log_every": 1, "eval_every": 1, "keep": 2}
    return Config(
        run=RunConfig(**run, eval_pictures=2, **changes),
        model=ModelConfig(
            latent_channels=2, norm_groups=2, encoder_channels=(4, 4), decoder_channels=(4, 64), encoder_blocks=1,
            decoder_blocks=1, condition=False, mid_attention=False,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=1, discriminator_layers=1),
        data=DataConfig(image_size=16, batch_size=2),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, schedule="constant"),
        mesh=MeshConfig(data=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_device(shared_programs):
    """The devices are eight otherwise, and a batch of two pictures does not split over them."""
    with pytest.MonkeyPatch.context() as patch:
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:1]))
        with jax.numpy_dtype_promotion("standard"):
            yield make(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def asked():
    """What JAX's preemption service was asked."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device, asked):
    directory = tmp_path_factory.mktemp("damaged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
        assert train(_config(directory)) == 0
    return directory


def test_saving_does_not_ask_whether_to_stop(run, asked):
    # The service compares one number with that of the loop's calls: a step's number would put SIGTERM off by as much.
    assert asked == []


@functools.cache
def _abstract(mesh):
    """Of the same shapes wherever a run lies."""
    return abstract_state(make_blueprint(_config("anywhere")), mesh)


def _resume(config, mesh):
    """The arrays, the progress and the step that a run resumes with."""
    with jax.set_mesh(mesh):
        checkpoints = RunCheckpoints(config)
        resumed = checkpoints.resume(_abstract(mesh), lambda _: None)
        checkpoints.close(together=True)
    return [np.asarray(x) for x in jax.tree.leaves(resumed.state)], resumed.progress, int(resumed.state.step)


def _equal(a, b) -> bool:
    return a[1:] == b[1:] and all(np.array_equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def _damage(file, kind: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def test_damaged_steps_resume_or_are_refused_with_one_line(run, one_device, tmp_path):
    sound, rng = _resume(_config(run), one_device), random.Random(TIMES)
    step = run / "checkpoints" / "2"
    files = sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())
    # Large files hold the numbers, and are as likely as all the others together.
    large = [file for file in files if (step / file).stat().st_size > 50_000 and "d" in file.parts]
    assert large
    results, messages = Counter(), []
    for i in range(COUNT):
        copy = tmp_path / str(i)
        shutil.copytree(step, copy / "checkpoints" / "2")
        file = rng.choice(large if rng.random() < 0.5 else files)
        kind = rng.choice(("missing", "cut", "flipped"))
        _damage(copy / "checkpoints" / "2" / file, kind, rng)
        try:
            result = _resume(_config(copy), one_device)
        except CheckpointError as error:
            messages.append(str(error))
            results[kind, "refused"] += 1
        else:
            assert _equal(result, sound), f"{kind}: {file}"
            results[kind, "resumed"] += 1
        shutil.rmtree(copy)
    tell("damaged checkpoints", Counter({f"{kind}, {end}": count for (kind, end), count in results.items()}))
    assert all(results[kind, "refused"] for kind in ("missing", "cut", "flipped")), results
    assert sum(results.values()) == COUNT
    assert all(re.fullmatch(rf"{tmp_path}/\d+/checkpoints/2 cannot be read: .+", message) for message in messages)


@pytest.mark.parametrize("item", ITEMS)
def test_a_run_goes_back_to_the_sound_step_when_asked(run, one_device, tmp_path, item):
    directory = tmp_path / "run"
    shutil.copytree(run, directory)
    shutil.rmtree(directory / "checkpoints" / "2" / item)
    with pytest.raises(
        CheckpointError, match=r"2 cannot be read: .*; step 1 can be: --run.fall_back=true resumes from"
    ):
        _resume(_config(directory), one_device)
    result = _resume(_config(directory, fall_back=True), one_device)
    assert result[2] == 1
    assert [p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()] == ["1"]
    assert [p.name for p in (directory / "damaged").iterdir()] == ["2"]
    # Once more, when the run has come to that step again.
    shutil.copytree(run / "checkpoints" / "2", directory / "checkpoints" / "2")
    shutil.rmtree(directory / "checkpoints" / "2" / item)
    assert _equal(_resume(_config(directory, fall_back=True), one_device), result)
    assert sorted(p.name for p in (directory / "damaged").iterdir()) == ["2", "2.1"]


def test_no_sound_step_is_said(run, one_device, tmp_path):
    for step in ("1", "2"):
        shutil.copytree(run / "checkpoints" / step, tmp_path / "checkpoints" / step)
        shutil.rmtree(tmp_path / "checkpoints" / step / "training")
    with pytest.raises(CheckpointError, match=r"no earlier step can be; choose another run\.directory"):
        _resume(_config(tmp_path, fall_back=True), one_device)


def test_reading_a_damaged_model_names_the_sound_step(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "2"
    largest = max((p for p in (step / "model").rglob("*") if "d" in p.parts), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"2 cannot be read: .*; step 1 beside it can be read: name .*/1$"
    ) as caught:
        load_parameters(tmp_path / "run")
    assert "\n" not in str(caught.value)
    load_parameters(tmp_path / "run" / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match="no earlier step beside it can be read"):
        load_parameters(tmp_path / "run")


def test_numbers_that_are_not_finite_are_damage(run, one_device, tmp_path, monkeypatch):
    """Releases before 0.2 kept such steps."""
    monkeypatch.setattr("asymvq_jax.training.checkpoints.all_finite", lambda _: False)
    with pytest.raises(CheckpointError, match="its parameters are not finite"):
        _resume(_config(run), one_device)


@pytest.mark.parametrize("item", ["progress", "model", "training"])
def test_what_the_files_do_not_guard_is_guarded(run, one_device, tmp_path, item):
    """Sound files, in which other things stand than were saved."""
    shutil.copytree(run / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    if item == "progress":
        file = tmp_path / "checkpoints" / "2" / "progress" / "metadata"
        progress = json.loads(file.read_text())
        file.write_text(json.dumps(progress | {"seconds": progress["seconds"] + 1}))
        message = "'progress' does not match its digest"
    else:
        # Those of another step, which are as whole and as large.
        shutil.rmtree(tmp_path / "checkpoints" / "2" / item)
        shutil.copytree(run / "checkpoints" / "1" / item, tmp_path / "checkpoints" / "2" / item)
        message = f"the numbers in its item '{item}' are not those that were written"
    with pytest.raises(CheckpointError, match=message):
        _resume(_config(tmp_path), one_device)


def test_damaged_metrics_never_end_a_run(run, tmp_path):
    rng, outcomes = random.Random(TIMES), Counter[str]()
    whole = (run / "metrics.jsonl").read_bytes()
    for i in range(COUNT):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "metrics.jsonl").write_bytes(whole)
        _damage(directory / "metrics.jsonl", rng.choice(("missing", "cut", "flipped")), rng)
        RunLog(directory, step=2, steps=3, active=True).close()
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line, parse_constant=pytest.fail)["step"] <= 2
        outcomes["gone on with, JSON in every line"] += 1
    tell("damaged metrics.jsonl", outcomes)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        RunLog(tmp_path, step=2, steps=3, active=True)


def test_the_command_prints_one_line_and_ends_with_2(run, tmp_path, one_device, monkeypatch, capfd):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "model" / "d")
    file = write_config(tmp_path / "config.py", _config(tmp_path / "run"))
    monkeypatch.setattr("asymvq_jax.devices.cluster.join", lambda: None)
    assert command.main([f"--config={file}"]) == 2
    error = capfd.readouterr().err
    assert error.count("error: ") == 1
    assert "--run.fall_back=true resumes from it" in error
    assert "Traceback" not in error
    assert command.main([f"--config={file}", "--run.fall_back=true", "--run.steps=1"]) == 0
