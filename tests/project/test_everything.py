"""The command for a new accelerator: what it measures in which order, how it goes on, and what its page says."""

import json

import pytest

from asymvq_jax.commands import benchmark
from asymvq_jax.config import load_config
from benchmarks.everything import cases, command, page, worker
from benchmarks.everything.cases import COMPILED, EAGER, OURS, SUBJECTS, Case, Measurement, Settings, groups, read

CONFIG = """
from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, RunConfig

def get_config():
    sizes = dict(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1)
    loss = LossConfig(perceptual_weight=0.0, discriminator_features=4, discriminator_layers=1)
    return Config(run=RunConfig(init_from="x"), model=ModelConfig(**sizes), data=DataConfig(source="photos"), loss=loss)
"""
BLOCKED = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name in ("torch", "diffusers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
"""
DEVICE = {
    "name": "Chip 1", "platform": "gpu", "count": 1, "cores": 4, "versions": {"jax": "0.12"}, "dtype": "bfloat16",
    "side": 8192, "peak": 5e14, "published": 1e15,
}  # fmt: skip


def _settings(**changes) -> Settings:
    given = {"configs": ("x2", "base", "x1_5"), "sizes": (256, 512), "batches": (1, 8), "subjects": SUBJECTS}
    return Settings(**({**given, "dtype": None, "torch": True} | changes))


def test_what_is_measured_and_in_which_order():
    found = groups(_settings(), "gpu")
    names = [group.name for group in found]
    assert names[:3] == ["decode x2, ours", "train_step x2, ours", "decode x2, PyTorch eager"]
    assert len(set(names)) == len(names)
    measured = {(c.subject, c.contender, c.config, c.size, c.batch) for group in found for c in group.cases}
    for contender in (OURS, EAGER, COMPILED):
        sizes = [(side, batch) for side in (256, 512) for batch in (1, 8)]
        assert {("decode", contender, config, *s) for config in ("x2", "base", "x1_5") for s in sizes} <= measured
        assert {("train_step", contender, config, 256, 8) for config in ("x2", "base")} <= measured
        assert {("generate", contender, "", 512, batch) for batch in (1, 8)} <= measured
    assert ("input", OURS, "x2", 256, 8) in measured
    assert len({case.file(command.Path("x")) for group in found for case in group.cases}) == len(measured)
    for settings, platform in ((_settings(torch=False), "gpu"), (_settings(), "tpu")):
        assert {c.contender for group in groups(settings, platform) for c in group.cases} == {OURS}


def test_the_page(tmp_path):
    everything = groups(_settings(configs=("x2",), batches=(1,)), "gpu")
    Measurement(Case("decode", OURS, "x2", 256, 1), [0.01, 0.03, 0.02], 9.0, 2**31, 4e12).write(tmp_path)
    Measurement(Case("decode", EAGER, "x2", 256, 1), [0.05], 3.0, 2**30, 4e12).write(tmp_path)
    Measurement(Case("decode", COMPILED, "x2", 256, 1), [0.03], 70.0, 2**30, 4e12).write(tmp_path)
    Measurement(Case("decode", OURS, "x2", 512, 1), error="out of memory").write(tmp_path)
    Measurement(Case("input", OURS, "x2", 256, 1), waiting=0.0123, images_per_second=99).write(tmp_path)
    text = page.write(DEVICE, everything, tmp_path, compared=True)
    assert text.startswith("# Chip 1\n")
    assert "MFU is of the published 1000" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:5] == "| x2 "]
    ours = ["20 ms", "10 to 30", "50", "200", "20.0%", "1.50", "9.0 s", "2.00 GiB"]
    assert rows[0] == ["x2", "256", "1", "ours", *ours]
    assert [row[9] for row in rows[1:3]] == ["0.60", "1.00"]
    assert rows[3][4] == "failed: out of memory"
    assert "waited 1.23% of its time for input, at 99 images/s" in text
    assert "- decode x2, PyTorch eager: 1 x 512 px" in text
    assert page.progress(everything, tmp_path).startswith("5 of ")


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """What is known is not measured again; what was begun in vain comes last; another device is another directory."""
    tried, device = [], dict(DEVICE)

    def run_group(group, folder, settings, _, end):
        if group is command.DEVICE:
            cases.write_json(folder / "device.json", device)
            return "1 s"
        tried.append(group.name)
        if group.name != "decode x2, ours":
            for case in group.cases:
                Measurement(case, [1.0]).write(folder)
        return "1 s"

    monkeypatch.setattr(command, "run_group", run_group)
    arguments = ["--everything", f"--out={tmp_path}", "--configs=x2", "--subjects=decode,train_step"]
    assert benchmark.main([*arguments, "--minutes=0"]) == 0
    assert tried == []
    assert benchmark.main([*arguments]) == 0
    assert tried[:2] == ["decode x2, ours", "train_step x2, ours"]
    count = len(tried)
    (tmp_path / "measurements" / "decode-x2-8x512-PyTorch_eager.json").unlink()
    assert benchmark.main(arguments) == 0
    assert tried[count:] == ["decode x2, ours", "decode x2, PyTorch eager"]
    assert "14 of 18 measured; the same command again goes on" not in capsys.readouterr().out
    device["name"] = "Chip 2"
    assert benchmark.main(arguments) == 2
    assert "measurements with another name: Chip 1, now Chip 2" in capsys.readouterr().err
    assert json.loads((tmp_path / "device.json").read_text())["name"] == "Chip 1"
    assert benchmark.main([*arguments, "--subjects=decoding"]) == 2


@pytest.mark.parametrize(("platform", "first"), [("cpu", "base"), ("gpu", "x2")])
def test_a_cpu_begins_with_the_smallest_configuration(platform, first, tmp_path, monkeypatch):
    tried = []

    def run_group(group, folder, settings, *_):
        if group is command.DEVICE:
            cases.write_json(folder / "device.json", DEVICE | {"platform": platform})
        tried.append(group.name)
        return "1 s"

    monkeypatch.setattr(command, "run_group", run_group)
    assert benchmark.main(["everything", f"--out={tmp_path}"]) == 0
    assert tried[1] == f"decode {first}, ours"
    assert {name.split(",")[0] for name in tried if name.startswith("decode")} == {
        f"decode {config}" for config in ("x2", "base", "x1_5")
    }


def test_ours_is_measured_without_pytorch(tmp_path, monkeypatch, capsys):
    """By processes that cannot import it."""
    (tmp_path / "small.py").write_text(CONFIG)
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda n: None if n in ("torch", "diffusers") else find(n))
    options = [f"--configs={tmp_path / 'small.py'}", "--sizes=8", "--batches=1", "--subjects=decode"]
    assert benchmark.main(["everything", f"--out={tmp_path / 'out'}", *options]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch and diffusers are not installed: only ours is measured" in printed
    assert "1 of 1 measured" in printed
    known = read(Case("decode", OURS, str(tmp_path / "small.py"), 8, 1), tmp_path / "out")
    assert known.done
    assert min(known.seconds) > 0
    assert known.flops > 0
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "only ours was measured" in text


def test_the_wait_for_input_is_that_of_a_real_run(tmp_path, monkeypatch, standard_promotion):
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.setattr(worker, "LAP", 1)
    monkeypatch.setattr(worker, "LAPS", 2)
    case = Case("input", OURS, str(tmp_path / "small.py"), 32, 8)
    end = worker.time.monotonic() + 600
    worker.measure_input(worker.Task((case,), tmp_path, "float32", {"platform": "cpu", "cores": 2}, end))
    known = read(case, tmp_path)
    assert known.done
    assert 0 <= known.waiting < 1
    assert known.images_per_second > 0


def test_what_cannot_be_done_in_time_is_not_begun(tmp_path):
    case = Case("decode", OURS, "base", 256, 1)
    task = worker.Task((case,), tmp_path, "float32", {"peak": 1e9}, worker.time.monotonic() + 60)
    worker.measure(task, tmp_path)
    known = read(case, tmp_path)
    assert not known.done
    assert "two runs take at least" in known.skipped


@pytest.mark.parametrize("name", ["x2", "base", "x1_5"])
def test_the_training_that_is_measured(name, tmp_path):
    config = worker.step_config(Case("train_step", OURS, name, 256, 8), "bfloat16", tmp_path)
    assert config.model == load_config(name).model
    assert (config.data.image_size, config.data.batch_size, config.loss.gan_start) == (256, 8, 0)
