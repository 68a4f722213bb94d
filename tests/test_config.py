"""Configuration: overrides, messages, and every file in configs/."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from asymvq_jax.config import Config, ModelConfig, RunConfig, from_dict, load_config, override, to_json
from asymvq_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = Config(run=RunConfig(init_from="somewhere"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_builds_and_says_what_it_is(path):
    config = load_config(path)
    assert config == from_dict(Config, json.loads(to_json(config)))
    assert path.read_text().startswith('"""')


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
