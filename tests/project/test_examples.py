"""The scripts of examples/ do on tiny models what they say."""

import json
import re
import runpy
import sys

import nbformat
import numpy as np
import pytest
from flax import nnx
from nbclient import NotebookClient
from processes import ROOT

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import convert
from asymvq_jax.files import images
from asymvq_jax.models import embedded
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_parameters, save_model
from asymvq_jax.training import loop
from asymvq_jax.training.state import starting_parameters

EXAMPLES = ROOT / "examples"
# With a scale and a shift that no published model has.
PLAIN = ModelConfig(
    encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1, condition=False,
    quant_conv=False, latent_channels=6, scaling_factor=0.7, shift_factor=0.2,
)  # fmt: skip
TINY = """
from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig

def get_config():
    return Config(
        run=RunConfig(init_from="-", log_every=1, eval_pictures=8, keep=1),
        model=ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 64), encoder_blocks=1, decoder_blocks=1),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=8),
        data=DataConfig(image_size=16, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
"""


def run(script, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        images.write(tmp_path / "photos" / f"{i}.png", rng.integers(0, 255, (20, 24, 3), np.uint8))
    return tmp_path / "photos"


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path / "tiny.py"


@pytest.mark.parametrize("first", [True, False])
def test_latents_of_both_layouts_are_decoded(first, tmp_path, monkeypatch):
    model = Autoencoder(PLAIN, rngs=nnx.Rngs(0))
    save_model(tmp_path / "model", model)
    latents = np.random.default_rng(0).normal(size=(3, 6, 5, 7)).astype(np.float32)
    np.save(tmp_path / "some.npy", latents if first else latents.transpose(0, 2, 3, 1))
    options = {"--checkpoint": tmp_path / "model", "--latents": tmp_path / "some.npy", "--out": tmp_path, "--batch": 2}
    run("decode_latents.py", *[x for pair in options.items() for x in pair], monkeypatch=monkeypatch)
    expected = inference.decode(model, latents.transpose(0, 2, 3, 1) / 0.7 + 0.2)
    for i in range(3):
        picture = images.read(tmp_path / f"some_{i:04d}.png").astype(int)
        assert picture.shape == (10, 14, 3)
        assert np.abs(picture - images.to_uint8(expected[i])).max() <= 1


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `train` has been called with; a run has tests of its own."""
    configs = []
    monkeypatch.setattr(loop, "train", lambda config: configs.append(config) or 0)
    return configs


def test_a_folder_is_trained_on_for_some_epochs(photos, tiny, trained, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run(
            "train_on_folder.py", photos, "--init-from", "weights/some", "--out", "runs/some", "--config", tiny,
            "--epochs", 20, "--loss.gan_start=-1", monkeypatch=monkeypatch,
        )  # fmt: skip
    assert end.value.code == 0
    (config,) = trained
    # 40 pictures less a few held-out ones, by 8.
    assert 80 <= config.run.steps < 100
    assert config.run.eval_every == config.run.steps // 10
    assert (config.data.source, config.data.path, config.run.init_from) == ("folder", str(photos), "weights/some")
    # What follows has the last word.
    assert config.loss.gan_start == -1


def test_a_decoder_is_trained_for_other_latents(photos, tiny, trained, tmp_path, monkeypatch):
    save_model(tmp_path / "jax", Autoencoder(PLAIN, rngs=nnx.Rngs(0)))
    convert(tmp_path / "jax", tmp_path / "theirs", "diffusers")
    arguments = [tmp_path / "theirs", "--photos", photos, "--out", tmp_path / "run", "--config", tiny]
    # The second time it has the autoencoder already.
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run("train_for_your_latents.py", *arguments, "--run.steps=9", monkeypatch=monkeypatch)
        assert end.value.code == 0
    config, again = trained
    assert config == again
    assert (config.model.latent_channels, config.model.scaling_factor, config.model.shift_factor) == (6, 0.7, 0.2)
    assert (config.model.decoder_channels, config.model.condition, config.run.steps) == ((32, 64), True, 9)
    taken = starting_parameters(config, *load_parameters(config.run.init_from))
    assert "encoder.conv_in.kernel" in taken


def test_the_curves_of_runs_are_drawn(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        lines = [{"step": step, "l1": 1 / step, "adaptive_weight": step} for step in (10, 20, 30)]
        lines += [{"step": 30, "held_out/l1": 0.1, "held_out/preservation": 0.2}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "curves.svg"
    with pytest.raises(SystemExit) as end:
        run("plot_run.py", *runs, "--out", out, monkeypatch=monkeypatch)
    assert end.value.code == 0
    text = out.read_text()
    for title in ("l1", "adaptive weight", "preservation", f"{tmp_path}/b, held out"):
        assert f"<!-- {title} -->" in text
    for arguments, message in (
        ([*runs, "--values", "l2"], "--values l2: expected some of adaptive_weight, l1, preservation"),
        ([tmp_path], f"no metrics.jsonl in {tmp_path}"),
    ):
        with pytest.raises(SystemExit) as end:
            run("plot_run.py", *arguments, "--out", out, monkeypatch=monkeypatch)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not embedded.FOLDER.is_dir(), reason="the models inside the package are not in this clone")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "inpaint.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    plain, asymmetric = (float(re.search(rf"{name} +error of the kept pixels: +([\d.]+)", printed)[1])
                         for name in ("plain decode", "asymmetric"))  # fmt: skip
    assert asymmetric < 0.75 * plain
    assert images.read(tmp_path / "result.png").shape == (400, 584, 3)
