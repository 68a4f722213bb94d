"""Where an autoencoder is found, how it may be spelled, how its latents are scaled; what other things are called."""

import dataclasses
import json
import logging
import os
import re
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fuzzing import TIMES, tell
from safetensors.numpy import save_file

from asymvq_jax.commands.convert import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import config_to_diffusers, convert
from asymvq_jax.convert.mapping import dump_tensors
from asymvq_jax.convert.reading import describe, given_factors
from asymvq_jax.errors import ConvertError, OutputError, TensorFileError, UserError
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.parameters import merge

CONFIG = ModelConfig(
    encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1, condition=False
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_model(config=CONFIG):
    graphdef, shapes = structure(config)
    rng = np.random.default_rng(0)
    return merge(graphdef, {n: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32) for n, x in shapes.items()})


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def original(model):
    return dump_tensors(model, "ldm")


@pytest.fixture(scope="module")
def theirs(model):
    return dump_tensors(model, "diffusers")


def prefixed(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


def assert_same(described, original, theirs):
    """All tensors, bit by bit, whatever they are called and shaped in the file."""
    expected = theirs if described.form == "diffusers" else original
    assert set(described.tensors) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(described.tensors[name].read(), x, err_msg=name)


@pytest.mark.parametrize(
    "prefix",
    ["", "vae.", "first_stage_model.", "module.", "_orig_mod.", "module._orig_mod.first_stage_model._orig_mod.",
     "model.first_stage_model.", "ema_model.", "generator.autoencoder.", "state_dict."],
)  # fmt: skip
def test_an_autoencoder_is_found_under_any_prefix(prefix, original, theirs, tmp_path):
    beside = {"model.diffusion_model.out.2.weight": np.ones((2, 2), np.float32), "global_step": np.ones(())}
    save_file(prefixed(original, prefix) | beside, tmp_path / "x.safetensors")
    described = describe(tmp_path / "x.safetensors")
    assert described.config == CONFIG
    assert_same(described, original, theirs)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": [torch.ones(3)]}},
        lambda state: {"epoch": 3, "checkpoint": {"model_state_dict": state}},
        lambda state: {"params": state, "params_ema": {n: x + 1 for n, x in state.items()}},
        lambda state: {"params_ema": state},
        lambda state: {"state_dict": {f"first_stage_model.{n}": torch.nn.Parameter(x) for n, x in state.items()}},
    ],
)
def test_an_autoencoder_is_found_in_any_dictionary(nest, original, theirs, tmp_path):
    torch.save(nest({n: torch.from_numpy(x.copy()) for n, x in original.items()}), tmp_path / "x.pt")
    assert_same(describe(tmp_path / "x.pt"), original, theirs)


SPELLINGS = {
    "newer": {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    "older": {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"},
}


@pytest.mark.parametrize("age", SPELLINGS)
@pytest.mark.parametrize("rank", [2, 4])
def test_attention_of_any_spelling_and_rank(age, rank, original, theirs, tmp_path):
    tensors = {}
    for name, x in original.items():
        layer = name.split(".")[-2]
        if ".attn_1." in name:
            name = name.replace(f".attn_1.{layer}.", f".attn_1.{SPELLINGS[age][layer]}.")
            x = x.reshape(x.shape[:rank]) if x.ndim == 4 else x
        elif name.startswith(("quant_conv", "post_quant_conv")):
            # Biases of a 1x1 convolution with all four axes, and weights of a linear layer.
            x = x.reshape(1, -1, 1, 1) if x.ndim == 1 else x.reshape(x.shape[:rank])
        tensors[name.replace("nin_shortcut", "conv_shortcut")] = np.ascontiguousarray(x)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(describe(tmp_path / "x.safetensors"), original, theirs)


def test_diffusers_names_in_one_file(original, theirs, tmp_path):
    save_file(theirs, tmp_path / WEIGHTS)
    described = describe(tmp_path / WEIGHTS)
    assert (described.form, described.config) == ("diffusers", CONFIG)
    assert_same(described, original, theirs)
    # With the configuration beside it, that counts.
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG) | {"scaling_factor": 0.5}))
    assert describe(tmp_path / WEIGHTS).config.scaling_factor == 0.5


def test_a_shard_stands_for_all_of_them(original, theirs, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG)))
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    mapped = {name: files[i % 2] for i, name in enumerate(theirs)}
    for file in files:
        save_file({n: x for n, x in theirs.items() if mapped[n] == file}, tmp_path / file)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": mapped}))
    for source in (tmp_path, tmp_path / files[1]):
        assert_same(describe(source), original, theirs)


def one(*shape):
    return np.ones(shape, np.float32)


KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("beside", "metadata", "scale"),
    [
        ({"scale_factor": np.array(0.2276, np.float32)}, {}, (0.2276, 0)),
        ({}, {"scaling_factor": "0.25", "shift_factor": "0.5"}, (0.25, 0.5)),
        ({KEY: one(8, 768)}, {}, (0.18215, 0)),
        ({KEY: one(8, 2048)}, {}, (0.13025, 0)),
        ({KEY: one(8, 768), "model.diffusion_model.label_emb.0.0.weight": one(2, 2)}, {}, (0.13025, 0)),
        ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, (0.13025, 0)),
        # A transformer of latents with other channels says nothing of these.
        ({"model.diffusion_model.double_blocks.0.x.weight": one(2)}, {}, (0.18215, 0)),
    ],
)
def test_the_scale_is_what_the_file_tells(beside, metadata, scale, original, tmp_path, caplog):
    save_file(prefixed(original, "first_stage_model.") | beside, tmp_path / "x.safetensors", metadata)
    config = describe(tmp_path / "x.safetensors").config
    assert (config.scaling_factor, config.shift_factor) == scale
    # What the user says wins, with a line on what it wins over.
    caplog.clear()
    factors = {"scaling_factor": 0.75, "shift_factor": 0.0}
    assert describe(tmp_path / "x.safetensors", factors).config.scaling_factor == 0.75
    if "double_blocks" not in str(beside):
        assert f"as given; the file has {scale[0]}" in caplog.text


def test_a_default_scale_is_said(original, tmp_path, caplog):
    save_file(original, tmp_path / "vae.safetensors")
    assert describe(tmp_path / "vae.safetensors").config.scaling_factor == 0.18215
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert "the file does not say how latents are scaled" in line
    assert "0.13025" in line
    (tmp_path / "vae.safetensors").rename(tmp_path / "sdxl_vae.safetensors")
    with pytest.raises(ConvertError, match=r"name mentions Stable Diffusion XL.*give --scaling-factor 0\.13025"):
        describe(tmp_path / "sdxl_vae.safetensors")
    assert describe(tmp_path / "sdxl_vae.safetensors", {"scaling_factor": 0.5}).config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("sign", "scale"), [("joint_blocks", (1.5305, 0.0609)), ("double_blocks", (0.3611, 0.1159)), ("", None)]
)
def test_sixteen_channels_have_the_scale_of_their_model_or_ask(sign, scale, tmp_path):
    config = dataclasses.replace(CONFIG, latent_channels=16, quant_conv=False)
    tensors = prefixed(dump_tensors(random_model(config), "ldm"), "vae.")
    save_file(tensors | ({f"model.diffusion_model.{sign}.0.x": one(2)} if sign else {}), tmp_path / "x.safetensors")
    if scale is None:
        with pytest.raises(ConvertError, match="latents of 16 channels; give --scaling-factor and --shift-factor"):
            describe(tmp_path / "x.safetensors")
    else:
        read = describe(tmp_path / "x.safetensors").config
        assert (read.scaling_factor, read.shift_factor) == scale


def test_a_scale_that_is_none():
    assert given_factors(None, 0.5) == {"shift_factor": 0.5}
    for factors in ((0.0, None), (float("nan"), None), (float("inf"), None), (1.0, float("inf"))):
        with pytest.raises(ConvertError, match=r"factor .*: expected a .*number"):
            given_factors(*factors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": one(1)}, "holds no autoencoder: it is a LoRA"),
        ({"decoder.layers.1.weight": one(1), "encoder.layers.0.weight": one(1)}, "it is TAESD"),
        ({"double_blocks.0.img_attn.qkv.weight": one(1)}, "it is FLUX's or a similar transformer"),
        ({"joint_blocks.0.x": one(1), "model.diffusion_model.joint_blocks.0.x": one(1)}, "Stable Diffusion 3's"),
        ({"model.diffusion_model.out.2.weight": one(1)}, r"a diffusion model without one \(NoVAE\)"),
        ({"text_model.encoder.layers.0.x": one(1)}, "it is CLIP"),
        ({"encoder.conv_in.conv.weight": one(1, 1, 1, 1, 1)}, "a video model's autoencoder"),
        ({"encoder.down_blocks.3.0.conv_out.conv_inverted.weight": one(1)}, "a deep compression autoencoder"),
        ({"decoder.upsamples.0.residual.0.gamma": one(1)}, "is Wan's or Qwen-Image's autoencoder without"),
        ({"x": one(1)}, r"missing encoder\.conv_in\.weight, decoder\.conv_in\.weight"),
        ({"decoder.conv_in.weight": one(1)}, "only its decoder is there"),
    ],
)
def test_other_things_are_called_by_their_names(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConvertError, match=message):
        describe(tmp_path / "x.safetensors")


def test_autoencoders_that_are_not_ours(original, tmp_path):
    gumbel = original | {"quantize.proj.weight": one(1), "quantize.embed.weight": one(1)}
    other = original | {"post_quant_conv.weight": one(4, 3, 1, 1)}
    for tensors, message in (
        (gumbel, "is a VQGAN with a Gumbel quantiser"),
        (other, "has latents of 3 channels .* a decoder that takes 4"),
        (prefixed(original, "a.") | prefixed(original, "b."), r"holds 2 models of one kind, a\.\*, b\.\*"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ConvertError, match=message):
            describe(tmp_path / "x.safetensors")
    for kind, message in (
        ("AutoencoderTiny", "AutoencoderTiny' (TAESD's kind"),
        ("AutoencoderKLMochi", "AutoencoderKLMochi' (a video model's autoencoder)"),
        ("AutoencoderDC", "AutoencoderDC' (a deep compression autoencoder with other layers)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(ConvertError, match=re.escape(message)):
            describe(tmp_path)


def test_sources_that_have_to_be_downloaded(original, tmp_path):
    for source, message in (
        ("https://host/org/name/x.safetensors", "is a URL, and nothing is downloaded here: download it"),
        ("org-of/some-model/vae", "first: hf download org-of/some-model --local-dir FOLDER, and name FOLDER/vae"),
        ("org-of/some-model", "model's id on the Hugging Face hub, download it first: hf download org-of/some-model"),
        (tmp_path / "none", "no checkpoint at"),
        # What a published configuration begins with, by the command in its head; not the id of a model on the hub.
        (
            "weights/stable_diffusion",
            "no checkpoint at weights/stable_diffusion: write it with: asymvq convert --checkpoint "
            "path/to/stable-diffusion-v1-5 --out weights/stable_diffusion, or name another",
        ),
        ("weights/sdxl", "asymvq convert --checkpoint path/to/stable-diffusion-xl-base-1.0 --out weights/sdxl, or"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            describe(source)


def test_the_hubs_cache(theirs, original, tmp_path):
    snapshots = tmp_path / "models--org--name" / "snapshots"
    for commit in ("aa", "bb"):
        (snapshots / commit / "vae").mkdir(parents=True)
        (snapshots / commit / "vae/config.json").write_text(json.dumps(config_to_diffusers(CONFIG)))
        save_file(theirs, snapshots / commit / "vae" / WEIGHTS)
    with pytest.raises(ConvertError, match="with 2 snapshots; name one of them"):
        describe(tmp_path / "models--org--name")
    (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text("bb\n")
    described = describe(tmp_path / "models--org--name")
    assert described.path == snapshots / "bb/vae"
    assert_same(described, original, theirs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scaling_factor", None, ""),
        ("norm_num_groups", None, ""),
        ("down_block_types", None, ""),
        ("mid_block_add_attention", None, ""),
        ("latent_channels", None, "missing latent_channels"),
        ("block_out_channels", None, "missing block_out_channels"),
        ("scaling_factor", "0.18", "scaling_factor='0.18' (expected a number)"),
        ("block_out_channels", [32, None], "block_out_channels=[32, None] (expected a list of whole numbers)"),
        ("layers_per_block", 10**9, "layers_per_block=1000000000 (expected a whole number from 1 to 100)"),
        ("latent_channels", 4.0, "latent_channels=4.0 (expected a whole number above 0)"),
        ("use_quant_conv", "yes", "use_quant_conv='yes' (expected true or false)"),
        ("down_block_types", "DownEncoderBlock2D", "down_block_types='DownEncoderBlock2D' (expected a list of texts)"),
    ],
)
def test_nulls_and_other_types_in_a_configuration(field, value, message, theirs, tmp_path):
    save_file(theirs, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG) | {field: value}))
    if message:
        with pytest.raises(ConvertError, match=re.escape(message)):
            describe(tmp_path)
    else:
        assert describe(tmp_path).config == CONFIG


def test_weights_that_are_not_finite_are_named(original, tmp_path):
    broken = {n: x.copy() for n, x in original.items()}
    broken["decoder.conv_out.bias"][0] = np.nan
    broken["encoder.mid.block_1.conv1.weight"][0, :2] = np.inf
    save_file(broken, tmp_path / "x.safetensors")
    with pytest.raises(ConvertError) as error:
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    for part in ("2 tensors have NaN or infinity", "decoder.conv_out.bias (1 of 3)", "conv1.weight (18 of 9216)"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_targets_that_cannot_be_written(original, tmp_path, monkeypatch, capsys):
    save_file(original, tmp_path / "x.safetensors")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file' / 'out'} cannot be written: " in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    for to, name in (("jax", "out"), ("diffusers", "out"), ("ldm", "out.ckpt")):
        with pytest.raises(OutputError, match=r"no space left on the device, which has 0\.0 MB free"):
            convert(tmp_path / "x.safetensors", tmp_path / name, to)
    monkeypatch.undo()

    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [tensorstore_spec=...]")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left on device$"):
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_configurations_are_read_or_refused_in_one_line(theirs, tmp_path):
    """Seeded: 100 config.json (FUZZ=10: 1000) with a byte changed or values of other types."""
    save_file(theirs, tmp_path / WEIGHTS)
    stored, values = config_to_diffusers(CONFIG), (None, "x", -1, 0, 1e9, [], {}, True, [32, "x"], [None], float("nan"))
    said = []
    for seed in range(100 * TIMES):
        rng = np.random.default_rng(seed)
        changed = dict(stored)
        changed[sorted(stored)[rng.integers(len(stored))]] = values[rng.integers(len(values))]
        data = bytearray(json.dumps(changed).encode())
        if seed % 2:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "config.json").write_bytes(data)
        try:
            describe(tmp_path)
        except (ConvertError, TensorFileError, UserError) as error:
            said.append(str(error).splitlines()[0])
    count = 100 * TIMES
    tell("damaged config.json", Counter({"read": count - len(said), "refused in one line": len(said)}))
    assert len(said) > count // 2
    assert all(str(tmp_path) in line for line in said)


def test_a_configuration_that_is_not_that_of_the_weights(theirs, tmp_path):
    """One line that says what differs, before a structure of that size is made."""
    save_file(theirs, tmp_path / WEIGHTS)
    for changes, message in (
        ({"block_out_channels": [32, 64]}, r"encoder_channels \(32, 64\) \(the weights have \(32, 32\)\)"),
        ({"layers_per_block": 60}, r"encoder_blocks 60 \(the weights have 1\)"),
        ({"mid_block_add_attention": False}, "mid_attention False"),
        ({"_class_name": "VQModel", "num_vq_embeddings": 16}, r"codebook_size 16 \(the weights have 0\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG) | changes))
        with pytest.raises(ConvertError, match=message) as error:
            describe(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'config.json'} is of another model than the weights")
    for field, value in (("scaling_factor", 0), ("norm_num_groups", 7)):
        (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG) | {field: value}))
        with pytest.raises(ConvertError, match=rf"^{re.escape(str(tmp_path / 'config.json'))}: model\."):
            describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(CONFIG) | {"act_fn": "swish"}))
    assert describe(tmp_path).config == CONFIG
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TensorFileError, match=r"config\.json is not readable as JSON: it is a Git LFS pointer"):
        describe(tmp_path)


def test_groups_are_what_the_configuration_says(tmp_path):
    config = dataclasses.replace(CONFIG, encoder_channels=(8, 12), decoder_channels=(8, 12), norm_groups=4)
    tensors = dump_tensors(random_model(config), "diffusers")
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(config)))
    assert describe(tmp_path).config == config
    # Without it nothing tells.
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(
        ConvertError, match=r"alone\.safetensors: model\.encoder_channels=\(8, 12\): expected .*groups=32"
    ):
        describe(tmp_path / "alone.safetensors")


def test_a_description_stands_for_its_folder(theirs, original, tmp_path):
    (tmp_path / "vae").mkdir()
    save_file(theirs, tmp_path / "vae" / WEIGHTS)
    (tmp_path / "vae/config.json").write_text(json.dumps(config_to_diffusers(CONFIG)))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("vae/config.json", "model_index.json"):
        assert_same(describe(tmp_path / name), original, theirs)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["latest", "checkpoint/mp_rank_00_model_states.pt"], "a checkpoint of DeepSpeed: name .*/mp_rank_00_model_st"),
        (["__0_0.distcp", ".metadata"], "a checkpoint of torch.distributed: write it as one file"),
        (["data.pkl", "version", "data/0"], "an unpacked PyTorch file: pack it again"),
        (["optimizer.bin", "model.safetensors"], r"did you mean .*/model\.safetensors\?"),
        (["checkpoints/last.ckpt"], r"did you mean .*/checkpoints/last\.ckpt\?"),
    ],
)
def test_folders_of_trainers_are_called_by_their_names(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ConvertError, match=message):
        describe(tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ConvertError, match=r"^x{100}\.\.\.x{20} cannot be read: File name too long$"):
        describe("x" * 5000)
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(ConvertError, match=r"pipe\.ckpt is neither a file nor a folder"):
        describe(tmp_path / "pipe.ckpt")


def test_a_scale_in_half_precision_is_the_number_that_was_meant(original, tmp_path):
    for kind in (np.float16, np.float32):
        save_file(original | {"scale_factor": np.array(0.13025, kind)}, tmp_path / "x.safetensors")
        assert describe(tmp_path / "x.safetensors").config.scaling_factor == 0.13025


def test_what_an_interrupted_download_leaves_is_said(original, tmp_path, caplog):
    blank = {n: np.zeros_like(x) if n.startswith("decoder.up.") else x for n, x in original.items()}
    save_file(blank, tmp_path / "x.safetensors")
    describe(tmp_path / "x.safetensors").load()
    count = sum(n.startswith("decoder.up.") and x.ndim == 4 for n, x in blank.items())
    assert f"{count} kernels are zero throughout" in caplog.text
