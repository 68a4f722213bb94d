"""Conversion: round trips, diffusers loading what we wrote, every tensor accounted for, no code from pickles."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from flax import nnx
from oracles import TINY, asymmetric, nchw, nhwc, numpy_state, perturb_norms, relative_error
from safetensors.numpy import load_file, save_file

from asymvq_jax.commands.convert import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import convert, read_model
from asymvq_jax.convert.mapping import dump_tensors
from asymvq_jax.errors import ConvertError, OutputError, TensorFileError
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, save_model
from asymvq_jax.models.parameters import split

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def theirs():
    return asymmetric(TINY)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers") / "model"
    theirs.save_pretrained(path)
    return path


def _same(a: Autoencoder, b: Autoencoder) -> None:
    (_, ours), (_, others) = split(a), split(b)
    assert set(ours) == set(others)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, others[name])


def test_diffusers_to_jax_and_back_is_exact(folder, theirs, tmp_path):
    convert(folder, tmp_path / "jax")
    convert(tmp_path / "jax", tmp_path / "back", "diffusers")
    before, after = numpy_state(theirs), load_file(tmp_path / "back" / WEIGHTS)
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_diffusers_loads_our_folder_and_decodes_the_same(folder, tmp_path):
    model = convert(folder, tmp_path / "out", "diffusers")
    loaded = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.scaling_factor == TINY.scaling_factor
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (1, 24, 40, 3)).astype(np.float32)
    mask = (rng.uniform(size=(1, 24, 40, 1)) > 0.5).astype(np.float32)
    z = rng.normal(size=(1, 3, 5, 4)).astype(np.float32)
    with torch.no_grad():
        expected = nhwc(loaded.decode(nchw(z), image=nchw(image), mask=nchw(mask)).sample)
    assert relative_error(model.decode(z, image, mask), expected) <= 1e-4


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_original_names_and_back_are_exact(folder, tmp_path, suffix):
    model = convert(folder, tmp_path / f"original{suffix}", "ldm")
    _same(read_model(tmp_path / f"original{suffix}"), model)


def test_original_checkpoint_with_all_that_surrounds_it(folder, theirs, tmp_path):
    model = read_model(folder)
    tensors = dump_tensors(model, "ldm")
    assert "decoder.encoder.layers.4.weight" in tensors
    # Levels are counted from the picture inwards: up.0 is the last to run.
    assert tensors["decoder.up.0.block.0.conv1.weight"].shape == (32, 64, 3, 3)
    assert tensors["encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    named = numpy_state(theirs)
    for layer in "qkv":
        linear = named[f"encoder.mid_block.attentions.0.to_{layer}.weight"]
        np.testing.assert_array_equal(tensors[f"encoder.mid.attn_1.{layer}.weight"][..., 0, 0], linear)
    extra = {"loss.logvar": np.zeros(()), "decoder.up_layers.0.deconv.weight": np.zeros((2, 2), np.float32)}
    state = {k: torch.from_numpy(np.array(v)) for k, v in (tensors | extra).items()}
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "original.ckpt")
    _same(read_model(tmp_path / "original.ckpt"), model)

    whole = {f"first_stage_model.{k}": v for k, v in tensors.items()} | {"model.diffusion_model.x": np.ones(1)}
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in whole.items()}, tmp_path / "whole.safetensors")
    _same(read_model(tmp_path / "whole.safetensors"), model)


def _plain() -> AutoencoderKL:
    torch.manual_seed(0)
    return perturb_norms(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            scaling_factor=0.5,
        )
    ).eval()


def test_stable_diffusion_folder_with_new_and_old_names(tmp_path):
    theirs = _plain()
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    model = convert(tmp_path / "pipeline", tmp_path / "jax")
    assert not model.config.condition
    assert model.config.scaling_factor == 0.5
    _same(load_model(tmp_path / "jax"), model)

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "pipeline" / "vae" / WEIGHTS
    tensors = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, before)
                value = value[:, :, None, None] if value.ndim == 2 else value
        tensors[name] = np.ascontiguousarray(value)
    assert any(".query." in name for name in tensors)
    save_file(tensors, path)
    _same(read_model(tmp_path / "pipeline" / "vae"), model)

    convert(tmp_path / "jax", tmp_path / "back", "diffusers")
    AutoencoderKL.from_pretrained(tmp_path / "back")


def test_half_precision_is_widened(folder, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((folder / "config.json").read_text())
    tensors = {k: v.astype(np.float16) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, tmp_path / "half" / WEIGHTS)
    _, params = split(read_model(tmp_path / "half"))
    assert {str(v.dtype) for v in params.values()} == {"float32"}


def test_every_wrong_tensor_is_listed_and_nothing_is_written(folder, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_out.bias"], tensors["encoder.conv_in.weight"]
    tensors["stranger"] = np.zeros(2, np.float32)
    tensors["quant_conv.bias"] = np.zeros(5, np.float32)
    save_file(tensors, tmp_path / "bad" / WEIGHTS)
    assert main([str(tmp_path / "bad"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for part in (
        "4 tensors do not fit",
        "missing: decoder.conv_out.bias (3,)",
        "missing: encoder.conv_in.weight (32, 3, 3, 3)",
        "unexpected: stranger (2,)",
        "misshapen: quant_conv.bias (5,), expected (8,)",
    ):
        assert part in message
    assert not (tmp_path / "out").exists()


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"state_dict": {"x": _Evil(str(trace))}}, tmp_path / "evil.ckpt")
    with pytest.raises(TensorFileError, match=r"evil\.ckpt holds more than tensors, such as code.* posix\.mkdir"):
        convert(tmp_path / "evil.ckpt", tmp_path / "out")
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_left_alone(folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    for to in ("jax", "diffusers"):
        with pytest.raises(OutputError, match="exists already"):
            convert(folder, tmp_path / "out", to)
    assert (tmp_path / "out").read_text() == "mine"


def test_unusable_sources_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no pickle")
    (tmp_path / "page.ckpt").write_text("<html>")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for name, message in (
        ("nothing", "no checkpoint at"),
        ("empty", "holds no model checkpoint"),
        ("text.ckpt", "text.ckpt is not a PyTorch checkpoint"),
        ("page.ckpt", "page.ckpt is a web page"),
        ("text.safetensors", "is not a safetensors file"),
        ("other.safetensors", "holds no autoencoder: missing encoder.conv_in.weight"),
        ("unet", "_class_name is 'UNet2DConditionModel'"),
    ):
        with pytest.raises((ConvertError, TensorFileError), match=re.escape(message)):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"ends in \.safetensors or \.ckpt"):
        convert(folder, tmp_path / "out", "ldm")


def test_a_model_that_diffusers_cannot_hold(tmp_path):
    config = ModelConfig(encoder_channels=(32, 32, 32), decoder_channels=(32, 96, 96), decoder_blocks=1)
    save_model(tmp_path / "jax", Autoencoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ConvertError, match=r"cannot hold model\.decoder_channels=\(32, 96, 96\)"):
        convert(tmp_path / "jax", tmp_path / "out", "diffusers")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_original_checkpoint_of_ours_says_what_its_tensors_do_not(suffix, tmp_path):
    model = Autoencoder(dataclasses.replace(TINY, norm_groups=16, scaling_factor=0.13025), rngs=nnx.Rngs(0))
    save_model(tmp_path / "jax", model)
    convert(tmp_path / "jax", tmp_path / f"out{suffix}", "ldm")
    read = read_model(tmp_path / f"out{suffix}")
    assert read.config == model.config
    _same(read, model)


def test_command_line(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "jax")]) == 0
    assert "encoder 0.1 M, decoder 0.8 M, condition 0.2 M" in capsys.readouterr().out
    assert main([str(tmp_path / "jax"), str(tmp_path / "a.safetensors"), "--to", "ldm"]) == 0
