"""Variants of the autoencoder: VQ, without condition branch, other models' latents; against diffusers, and trained."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, VQModel
from oracles import nchw, nhwc, numpy_state, perturb_norms, relative_error
from processes import ROOT
from safetensors.numpy import load_file, save_file

from asymvq_jax import inference
from asymvq_jax.commands.convert import main
from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig, load_config
from asymvq_jax.convert.convert import config_to_diffusers, convert, diffusers_to_config, read_model
from asymvq_jax.convert.mapping import weights
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConvertError
from asymvq_jax.inference.export import export_decoder
from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.checkpoints import load_model, save_model
from asymvq_jax.models.parameters import merge, split
from asymvq_jax.training.state import create_state, make_blueprint, starting_parameters
from asymvq_jax.training.step import train_step

CONFIGS = ROOT / "configs"
WIDTHS = ("encoder_channels", "decoder_channels")
TOLERANCE = 1e-4
# The published first stages and autoencoders, a quarter of the width or less and fewer blocks.
VQ_F4 = ModelConfig(
    latent_channels=3,
    codebook_size=64,
    scaling_factor=1.0,
    encoder_channels=(32, 64, 128),
    decoder_channels=(32, 64, 128),
    condition=False,
)
VQ_F4_NO_ATTENTION = dataclasses.replace(VQ_F4, mid_attention=False, encoder_blocks=1, decoder_blocks=1)
VQ_F8 = ModelConfig(
    latent_channels=4,
    codebook_size=300,
    scaling_factor=1.0,
    encoder_channels=(32, 64, 64, 128),
    decoder_channels=(32, 64, 64, 128),
    encoder_blocks=1,
    decoder_blocks=1,
    attention_levels=(3,),
    condition=False,
)
SDXL = {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}
SD3 = {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX = SD3 | {"scaling_factor": 0.3611, "shift_factor": 0.1159, "mid_block_add_attention": True}
NORMALISED = {"scaling_factor": 1.0, "batch_norm_epsilon": 1e-4}
LATENTS = {"sdxl": SDXL, "sd3": SD3, "flux": FLUX}


def _vq_model(config: ModelConfig) -> VQModel:
    """diffusers' model of the same sizes."""
    prefixes = ["Attn" if i in config.attention_levels else "" for i in range(len(config.encoder_channels))]
    return VQModel(
        down_block_types=tuple(f"{p}DownEncoderBlock2D" for p in prefixes),
        up_block_types=tuple(f"{p}UpDecoderBlock2D" for p in reversed(prefixes)),
        block_out_channels=config.encoder_channels,
        layers_per_block=config.encoder_blocks,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.codebook_size,
        mid_block_add_attention=config.mid_attention,
        scaling_factor=config.scaling_factor,
    )


def _plain(fields: dict) -> AutoencoderKL:
    """diffusers' model of a published config.json, but narrower and with one block a level."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        **fields,
    )
    return perturb_norms(model).eval()


def _image(height: int = 40, width: int = 56, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def _same(a: Autoencoder, b: Autoencoder) -> None:
    assert a.config == b.config
    (_, ours), (_, others) = split(a), split(b)
    assert set(ours) == set(others)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, others[name])


@pytest.mark.parametrize("config", [VQ_F4, VQ_F4_NO_ATTENTION, VQ_F8], ids=["f4", "f4 without attention", "f8"])
def test_vq_models_equal_diffusers_and_convert_both_ways(config, tmp_path):
    torch.manual_seed(0)
    theirs, image = perturb_norms(_vq_model(config)).eval(), _image()
    with torch.no_grad():
        z = theirs.encode(nchw(image)).latents
        # A new codebook's codes lie so near together that one is nearest to nearly all latents.
        codes = theirs.quantize.embedding.weight
        codes.copy_(torch.randn(codes.shape) * z.std((0, 2, 3)) + z.mean((0, 2, 3)))
        expected = nhwc(theirs.decode(z).sample)
        codes = theirs.quantize(z)[2][2].numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "jax")
    assert ours.config == config
    assert relative_error(inference.encode(ours, image), nhwc(z)) <= TOLERANCE
    assert relative_error(inference.decode(ours, nhwc(z)), expected) <= TOLERANCE
    np.testing.assert_array_equal(ours.codebook(jnp.asarray(nhwc(z))).codes.ravel(), codes)
    assert len(np.unique(codes)) > 10

    convert(tmp_path / "jax", tmp_path / "back", "diffusers")
    back = VQModel.from_pretrained(tmp_path / "back")
    for name, value in numpy_state(theirs).items():
        np.testing.assert_array_equal(numpy_state(back)[name], value)
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "back"))
    differing = {n for n, v in before.items() if after.get(n, v) != v}
    assert differing == {"sample_size", "vq_embed_dim"}
    assert after["vq_embed_dim"] == config.latent_channels
    convert(tmp_path / "jax", tmp_path / "original.safetensors", "ldm")
    _same(read_model(tmp_path / "original.safetensors"), ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "spatial"}, r"norm_type='spatial' \(expected 'group'\)"),
        ({"vq_embed_dim": 8}, r"vq_embed_dim=8 \(expected 3\)"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "up_block_types="),
        ({"latents_mean": [0.1, 0.2, 0.3]}, r"latents_mean=\[0\.1, 0\.2, 0\.3\] \(expected None\)"),
        ({"num_vq_embeddings": None}, "missing num_vq_embeddings"),
    ],
)
def test_models_of_another_kind_are_refused(changes, message):
    fields = {
        "_class_name": "VQModel",
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "latent_channels": 3,
        "num_vq_embeddings": 8,
    }
    assert diffusers_to_config(fields, Path("config.json")).codebook_size == 8
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    with pytest.raises(ConvertError, match=message):
        diffusers_to_config(fields, Path("config.json"))


@pytest.mark.parametrize("name", ["vq_f4", "vq_f8"])
def test_published_vq_sizes(name):
    config = load_config(CONFIGS / f"{name}.py").model
    with torch.device("meta"):
        expected = {n: tuple(v.shape) for n, v in _vq_model(config).state_dict().items()}
    assert {w.name: w.torch_shape for w in weights(config, "diffusers")} == expected


@pytest.mark.parametrize("name", LATENTS)
def test_other_models_latents_equal_diffusers(name, tmp_path):
    theirs, image = _plain(LATENTS[name]), _image()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convert(tmp_path / "theirs", tmp_path / "jax")
    published = load_config(CONFIGS / f"{name}_x2.py").model
    for field in ("latent_channels", "scaling_factor", "shift_factor", "quant_conv", "mid_attention"):
        assert getattr(published, field) == getattr(ours.config, field)
    shift = theirs.config.shift_factor or 0.0
    with torch.no_grad():
        z = theirs.encode(nchw(image)).latent_dist.mode()
        # What a diffusion pipeline sees of it, and how it goes back.
        scaled = (z - shift) * theirs.config.scaling_factor
        expected = nhwc(theirs.decode(scaled / theirs.config.scaling_factor + shift).sample)
    assert relative_error(inference.encode(ours, image), nhwc(z)) <= TOLERANCE
    latent = inference.read_latent(scaled.numpy(), ours.config, image.shape[1:3])
    np.testing.assert_allclose(latent, nhwc(z), rtol=1e-4, atol=1e-5)
    assert relative_error(inference.decode(ours, latent), expected) <= TOLERANCE

    convert(tmp_path / "jax", tmp_path / "back", "diffusers")
    back = AutoencoderKL.from_pretrained(tmp_path / "back")
    assert (back.config.shift_factor or 0.0, back.config.scaling_factor) == (shift, theirs.config.scaling_factor)
    for key, value in numpy_state(theirs).items():
        np.testing.assert_array_equal(numpy_state(back)[key], value)


def _asymmetric(**changes) -> ModelConfig:
    fields = {
        "encoder_channels": (32, 32, 32, 32),
        "decoder_channels": (32, 64, 64, 64),
        "encoder_blocks": 1,
        "decoder_blocks": 1,
    }
    return ModelConfig(**(fields | changes))


def _random(config: ModelConfig) -> Autoencoder:
    graphdef, shapes = structure(config)
    rng = np.random.default_rng(0)
    return merge(graphdef, {n: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32) for n, x in shapes.items()})


def test_an_asymmetric_model_without_quant_conv_goes_to_diffusers_with_identities(tmp_path):
    model = _random(_asymmetric(latent_channels=16, scaling_factor=0.5, quant_conv=False))
    save_model(tmp_path / "jax", model)
    convert(tmp_path / "jax", tmp_path / "out", "diffusers")
    theirs = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.scaling_factor == 0.5
    image = _image()
    mask = (image[..., :1] > 0).astype(np.float32)
    with torch.no_grad():
        z = theirs.encode(nchw(image)).latent_dist.mode()
        expected = nhwc(theirs.decode(z, image=nchw(image), mask=nchw(mask)).sample)
    assert relative_error(inference.encode(model, image), nhwc(z)) <= TOLERANCE
    assert relative_error(inference.decode(model, nhwc(z), image, mask), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mid_attention": False}, "AsymmetricAutoencoderKL cannot hold model.mid_attention=False"),
        ({"condition": False}, "AutoencoderKL cannot hold model.decoder_channels=(32, 64, 64, 64) unlike"),
        ({"codebook_size": 8, "attention_levels": (2, 3)}, "AsymmetricAutoencoderKL cannot hold model.codebook_size=8"),
        (
            {"codebook_size": 8, "condition": False},
            "VQModel cannot hold model.decoder_channels=(32, 64, 64, 64) unlike",
        ),
    ],
)
def test_what_diffusers_cannot_hold_goes_to_original_names_and_back(changes, message, tmp_path):
    scaling = {"scaling_factor": 1.0} if "codebook_size" in changes else {}
    model = _random(_asymmetric(**changes, **scaling))
    with pytest.raises(ConvertError, match=re.escape(message) + ".*--to ldm"):
        config_to_diffusers(model.config)
    save_model(tmp_path / "jax", model)
    convert(tmp_path / "jax", tmp_path / "original.safetensors", "ldm")
    _same(read_model(tmp_path / "original.safetensors"), model)


def test_an_original_checkpoint_is_told_how_its_latent_is_scaled(tmp_path, capsys):
    model = _random(_asymmetric(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False))
    source, original, back = (str(tmp_path / name) for name in ("jax", "original.safetensors", "back"))
    save_model(source, model)
    factors = ["--scaling-factor=0.3611", "--shift-factor=0.1159"]
    for arguments, message in (
        (["--to=diffusers"], "AsymmetricAutoencoderKL cannot hold model.shift_factor=0.1159; --to ldm"),
        (
            ["--scaling-factor=0.5", "--shift-factor=0"],
            "scaling_factor and shift_factor: these options are for original checkpoints only; "
            f"{source} has a configuration with scaling_factor=0.3611, not 0.5 and shift_factor=0.1159, not 0.0",
        ),
    ):
        assert main([source, original, *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "original.safetensors").exists()
    assert main([source, original, "--to=ldm", *factors]) == 0
    assert main([original, back]) == 0
    _same(load_model(back), model)
    # Other programs' files have no such metadata.
    save_file(load_file(original), original)
    again = str(tmp_path / "again")
    for arguments, message in (
        ([], "scales its latents of 16 channels; give --scaling-factor and --shift-factor (Stable Diffusion 3: 1.5305"),
        (factors[:1], "scales its latents of 16 channels; give --shift-factor"),
    ):
        assert main([original, again, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([original, again, *factors]) == 0
    _same(load_model(again), model)


def test_a_full_mask_is_the_text_to_image_decoder():
    model = _random(_asymmetric())
    image = _image(16, 24)
    z = np.random.default_rng(1).normal(size=(1, 2, 3, 4)).astype(np.float32)
    full = inference.decode(model, z, image, np.ones((1, 16, 24, 1), np.float32))
    np.testing.assert_allclose(full, inference.decode(model, z), rtol=1e-5, atol=1e-6)
    kept = inference.decode(model, z, image, np.zeros((1, 16, 24, 1), np.float32))
    assert relative_error(kept, full) > 0.1


def test_vq_with_attention_in_strips_and_over_devices_and_exported():
    # Attention where the last blending with the condition follows it, and further in.
    model = _random(_asymmetric(**{n: (32, 64, 64) for n in WIDTHS}, attention_levels=(0, 1), codebook_size=300))
    rng = np.random.default_rng(1)
    image, mask = _image(32, 24), (rng.uniform(size=(1, 32, 24, 1)) > 0.5).astype(np.float32)
    z = rng.normal(0, 0.1, (1, 8, 6, 4)).astype(np.float32)
    whole = inference.decode(model, z, image, mask)
    assert relative_error(decode_in_strips(model, z, image, mask, strip_pixels=6 * 24), whole) <= 1e-5
    assert relative_error(encode_in_strips(model, image, strip_pixels=6 * 24), inference.encode(model, image)) <= 1e-5
    mesh = sharding.make_height_mesh(jax.devices()[:2])
    assert relative_error(inference.decode(model, z, image, mask, mesh=mesh), whole) <= 1e-5
    exported = export_decoder(model, 1, (32, 24), ("cpu",))
    assert relative_error(jax.jit(exported.call)(z, image, mask), whole) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": False},
        {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "quant_conv": False},
        {"codebook_size": 32, "attention_levels": (1,)},
        {"encoder_layers": "wan", "temporal_levels": (0,), "latent_patch": 2} | NORMALISED,
    ],
    ids=["text-to-image", "FLUX", "VQ", "Wan and FLUX.2"],
)
def test_a_wide_decoder_trains_on_a_frozen_latent(changes):
    config = Config(
        model=_asymmetric(encoder_channels=(32, 32), decoder_channels=(64, 64), **changes),
        run=RunConfig(init_from="first", steps=10),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        data=DataConfig(image_size=16, batch_size=2),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    plain = dataclasses.replace(config.model, condition=False, decoder_channels=(32, 32))
    first = split(_random(plain))[1]
    blueprint = make_blueprint(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = create_state(blueprint, mesh, starting_parameters(config, plain, first))
    assert set(state.frozen) == {name for name in first if not name.startswith("decoder.")}
    batch = {"image": _image(16, 16, 2) * 127.5 + 127.5, "mask": np.ones((2, 16, 16, 1))}
    batch = {name: x.astype(np.uint8) for name, x in batch.items()}
    # optax 0.2.8 raises floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        after, metrics = jax.jit(partial(train_step, blueprint=blueprint, adversarial=False))(state, {}, batch)
    for name, value in after.frozen.items():
        np.testing.assert_array_equal(value, first[name])
    moved = [name for name, value in after.params.items() if not np.array_equal(value, state.params[name])]
    assert {"decoder.conv_in.kernel", "decoder.levels.1.blocks.1.conv2.kernel"} <= set(moved)
    np.testing.assert_array_equal(metrics["loss"], metrics["nll"])
    if config.model.codebook_size:
        assert metrics["codebook"] == metrics["commitment"] > 0
        assert 1 <= metrics["perplexity"] <= 32
        assert 1 / 32 <= metrics["codes_used"] <= 1
    else:
        assert metrics["kl"] > 0
    json.dumps({name: float(value) for name, value in metrics.items()})
