"""Configuration: overrides, messages, and every file in configs/."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from asymvq_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    changed,
    from_dict,
    load_config,
    override,
    to_json,
)
from asymvq_jax.errors import ConfigError

CONFIGS = ROOT / "configs"
BASE = Config(run=RunConfig(init_from="somewhere"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_builds_and_says_what_it_is(path):
    config = load_config(path)
    assert config == from_dict(Config, json.loads(to_json(config)))
    assert path.read_text().startswith('"""')


def test_what_differs_from_the_defaults():
    assert changed(BASE) == {"run.init_from": "somewhere"}
    arguments = ["--data.mask.boxes=2", "--data.mask.strokes=1", "--model.decoder_channels=128,256,512,1024"]
    expected = {"data.mask.boxes": 2.0, "model.decoder_channels": (128, 256, 512, 1024)}
    assert changed(override(BASE, arguments)) == {"run.init_from": "somewhere"} | expected


def test_the_help_shows_the_values_of_a_field_that_has_a_few(capsys):
    with pytest.raises(SystemExit):
        override(BASE, ["--help"])
    shown = capsys.readouterr().out
    for option in ("--data.source {photos,folder,tfds}", "--run.initialization {random,wavelet}"):
        assert option in shown
    assert "{cosine,constant}" in shown


def test_overrides_replace_fields_at_any_depth():
    arguments = ["--model.dtype=bfloat16", "--run.steps", "7", "--data.crop=0.4,1", "--data.mask.full_probability=0"]
    config = override(BASE, [*arguments, "--model.remat=true"])
    assert config.model == dataclasses.replace(BASE.model, dtype="bfloat16", remat=True)
    assert config.run.steps == 7
    assert config.data.crop == (0.4, 1.0)
    assert config.data.mask.full_probability == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.dtyp=bfloat16"], "--model.dtyp is not a field of the configuration; did you mean --model.dtype?"),
        (["--data.mask.boxs=1"], "did you mean --data.mask.boxes?"),
        (["--data.mask=1"], "--data.mask is a group; name one of its fields: --data.mask.full_probability"),
        (["--run.steps=many"], "--run.steps='many': expected int"),
        (["--run.steps=0"], "run.steps=0: expected at least 1"),
        (["--run.steps"], "--run.steps: a value is missing"),
        (["run.steps=1"], "'run.steps=1': expected --field=value"),
        (["--run.steps.more=1"], "--run.steps.more: run.steps has no fields of its own"),
        (["--model.remat=maybe"], "--model.remat='maybe': expected true or false"),
        (["--model.dtype=float16"], "model.dtype='float16': expected one of float32, bfloat16"),
        (["--model.decoder_channels=128,200"], "each a multiple of model.norm_groups=32"),
        (["--model.decoder_channels=128,256"], "as many levels as model.encoder_channels"),
        (["--data.image_size=100"], "data.image_size=100: expected a multiple of 8"),
        (["--optimizer.accumulate=5"], "optimizer.accumulate=5: expected a divisor of data.batch_size=32"),
        (["--run.init_from="], "run.init_from='': expected a model checkpoint that holds the frozen encoder"),
        (["--data.source=web"], "data.source='web': expected one of photos, folder, tfds"),
        (["--data.source=folder"], "data.path='': expected a path or name for 'folder'"),
        (["--mesh.data=-1", "--mesh.fsdp=-1"], "at most one of them -1"),
    ],
)
def test_bad_overrides_name_the_field_and_the_remedy(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(BASE, arguments)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; did you mean .*demo\.py"):
        load_config(CONFIGS / "dmo.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"expected a function get_config\(\)"):
        load_config(tmp_path / "empty.py")
    with pytest.raises(ConfigError, match="width is not a field of ModelConfig"):
        from_dict(ModelConfig, {"width": 3})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "\ndef get_config(:", r"c\.py, line 2: SyntaxError: "),
        ("c.py", "\n\ndef get_config():\n    return Confg()", r"c\.py, line 4: NameError: name 'Confg'"),
        ("c.py", "import nothing_of_this_name", r"c\.py, line 1: ModuleNotFoundError: "),
        ("c.py", "raise SystemExit(3)", r"c\.py, line 1: SystemExit: 3"),
        ("c.py", "from asymvq_jax.config import RunConfig\nRunConfig(steps=-1)", r"c\.py: run\.steps=-1: expected"),
        ("c.json", "{}", r"c\.json: expected a Python file"),
    ],
)
def test_a_file_that_fails_is_one_line_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(init_from="x", steps="4"), "run.steps='4': expected an integer"),
        (lambda: RunConfig(init_from="x", keep=True), "run.keep=True: expected an integer"),
        (lambda: RunConfig(init_from="x", train_encoder=1), "run.train_encoder=1: expected True or False"),
        (lambda: RunConfig(init_from="x", seed=-1), "run.seed=-1: expected an integer from 0"),
        (lambda: RunConfig(init_from="x", seed=2**32), "run.seed=4294967296: expected an integer from 0"),
        (lambda: RunConfig(init_from=None), "run.init_from=None: expected a path"),
        (lambda: RunConfig(init_from="x", directory="a\0b"), "expected text without null characters"),
        (lambda: RunConfig(init_from="x", directory="~nobody_has_this_name/x"), "no home directory is known for it"),
        (lambda: DataConfig(batch_size=2.0), "data.batch_size=2.0: expected an integer"),
        (lambda: DataConfig(crop=(0.5,)), "data.crop=(0.5,): expected a tuple of 2 numbers"),
        (lambda: DataConfig(crop=0.5), "data.crop=0.5: expected a tuple of 2 numbers"),
        (lambda: DataConfig(crop=("0.5", 1)), "data.crop='0.5': expected a finite number"),
        (lambda: DataConfig(source=Path("photos")), "expected text"),
        (lambda: DataConfig(mask={"boxes": 1}), "data.mask={'boxes': 1}: expected a MaskConfig"),
        (lambda: ModelConfig(encoder_channels="128"), "model.encoder_channels='128': expected a tuple of integers"),
        (lambda: ModelConfig(encoder_channels=(64.0, 64)), "model.encoder_channels=64.0: expected an integer"),
        (lambda: LossConfig(kl_weight=float("nan")), "loss.kl_weight=nan: expected a finite number"),
        (lambda: OptimizerConfig(base_learning_rate=float("inf")), "base_learning_rate=inf: expected a finite number"),
        (lambda: OptimizerConfig(base_learning_rate="1e-4"), "base_learning_rate='1e-4': expected a finite number"),
        (lambda: OptimizerConfig(schedule="linear"), "optimizer.schedule='linear': expected one of cosine, constant"),
        (lambda: MeshConfig(data=None), "mesh.data=None: expected an integer"),
        (lambda: Config(run="runs/x"), "run='runs/x': expected a RunConfig"),
        (
            lambda: dataclasses.replace(BASE, optimizer=OptimizerConfig(min_learning_rate=1.0)),
            "expected at most the peak rate, optimizer.base_learning_rate x data.batch_size = 0.000144",
        ),
    ],
)
def test_values_of_another_type_or_form_name_the_field(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_values_are_kept_in_one_form(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = RunConfig(init_from=tmp_path / "first", directory="~/runs/x", steps=np.int64(7))
    config = Config(
        run=run,
        model=ModelConfig(encoder_channels=[64, 64], decoder_channels=[64, 64], scaling_factor=1),
        data=DataConfig(crop=[0.5, 1]),
    )
    assert run.init_from == str(tmp_path / "first")
    assert run.directory == str(tmp_path / "runs/x")
    assert config.model.encoder_channels == (64, 64)
    assert [type(side) for side in config.data.crop] == [float, float]
    assert (type(config.model.scaling_factor), type(config.run.steps)) == (float, int)
    assert from_dict(Config, json.loads(to_json(config))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "Config=None: expected the fields of a Config"),
        ({"run": []}, "run=[]: expected the fields of a RunConfig"),
        ({"run": {"init_from": "x", "steps": None}}, "run.steps=None: expected an integer"),
        ({"model": {}}, "Config lacks a field: .*'run'"),
    ],
)
def test_damaged_json_is_named(values, message):
    with pytest.raises(ConfigError, match=message if "*" in message else re.escape(message)):
        from_dict(Config, values)


def test_a_stored_minimum_above_the_peak_is_read_as_a_constant_rate():
    values = json.loads(to_json(BASE))
    del values["optimizer"]["schedule"]
    assert from_dict(Config, values) == BASE
    values["optimizer"]["min_learning_rate"] = 1.0
    constant = dataclasses.replace(BASE, optimizer=OptimizerConfig(schedule="constant"))
    assert from_dict(Config, values) == constant
