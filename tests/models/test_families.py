"""Autoencoders of FLUX.2, Wan and Qwen-Image on pictures: against diffusers' classes and its pipelines' scales."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, Flux2Pipeline, QwenImageEditPipeline
from oracles import nchw, nhwc, perturb_norms, relative_error
from processes import ROOT
from safetensors.numpy import load_file, save_file

import asymvq_jax
from asymvq_jax.config import load_config
from asymvq_jax.convert.convert import config_to_diffusers, convert, diffusers_to_config, read_model
from asymvq_jax.convert.mapping import weights
from asymvq_jax.convert.reading import describe
from asymvq_jax.errors import ConfigError, ConvertError, InputError
from asymvq_jax.inference.latents import read_latent, understand
from asymvq_jax.inference.strips import decode_in_strips
from asymvq_jax.models.growth import grow_decoder
from asymvq_jax.models.latent import normalization

TOLERANCE = 1e-4
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {"flux2": AutoencoderKLFlux2, "wan": AutoencoderKLWan, "qwen_image": AutoencoderKLQwenImage}
# Narrower, with three levels of one block; all else as published.
VIDEO = {"base_dim": 16, "dim_mult": [1, 2, 4], "temperal_downsample": [False, True], "num_res_blocks": 1, "z_dim": 4}
SIZES = {
    "flux2": {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 8,
    },
    "wan": VIDEO | {"decoder_base_dim": 24},
    "qwen_image": VIDEO,
}
NORMALISED = {"latents_mean": [0.1, -0.2, 0.3, 1.4], "latents_std": [1.5, 2.0, 3.0, 0.25]}


@pytest.fixture(scope="module", params=CLASSES)
def family(request, tmp_path_factory):
    """diffusers' model, ours as converted from it, and the folders of both."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = perturb_norms(CLASSES[name](**SIZES[name], **({} if name == "flux2" else NORMALISED))).eval()
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key.endswith("gamma"):
                value.uniform_(0.5, 1.5)
        if name == "flux2":
            theirs.bn.running_mean.normal_()
            theirs.bn.running_var.uniform_(0.1, 3)
            theirs.bn.num_batches_tracked.fill_(123)
    theirs.save_pretrained(folder / "theirs")
    return SimpleNamespace(name=name, theirs=theirs, ours=convert(folder / "theirs", folder / "jax"), folder=folder)


def _image(height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


def _tensor(family, x: np.ndarray) -> torch.Tensor:
    """As diffusers' class takes it: video models with one frame."""
    return nchw(x) if family.name == "flux2" else nchw(x)[:, :, None]


def _array(x: torch.Tensor) -> np.ndarray:
    return nhwc(x if x.ndim == 4 else x[:, :, 0])


def _as_seen(family, image: np.ndarray) -> np.ndarray:
    """The latent as diffusers' own pipeline makes it of a picture."""
    stand_in = SimpleNamespace(vae=family.theirs, latent_channels=4, _patchify_latents=Flux2Pipeline._patchify_latents)
    pipeline = Flux2Pipeline if family.name == "flux2" else QwenImageEditPipeline
    with torch.no_grad():
        return _array(pipeline._encode_vae_image(stand_in, _tensor(family, image), None))


def test_pictures_and_latents_equal_diffusers(family):
    image = _image()
    with torch.no_grad():
        z = family.theirs.encode(_tensor(family, image)).latent_dist.mode()
        expected = _array(family.theirs.decode(z).sample)
    z = _array(z)
    assert relative_error(asymvq_jax.encode(family.ours, image), z) <= TOLERANCE
    decoded = np.asarray(asymvq_jax.decode(family.ours, z))
    # Video models' classes clip.
    assert relative_error(decoded if family.name == "flux2" else decoded.clip(-1, 1), expected) <= TOLERANCE
    seen = _as_seen(family, image)
    assert relative_error(asymvq_jax.normalize_latent(family.ours, z), seen) <= 1e-6
    assert relative_error(asymvq_jax.denormalize_latent(family.ours, seen), z) <= 1e-6
    if family.name == "wan":
        assert relative_error(decode_in_strips(family.ours, z, strip_pixels=8 * 24), decoded) <= 1e-5


def test_every_tensor_comes_back(family, tmp_path):
    convert(family.folder / "jax", tmp_path / "back", "diffusers")
    before, after = (load_file(folder / WEIGHTS) for folder in (family.folder / "theirs", tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        np.testing.assert_array_equal(after[name], value)
    CLASSES[family.name].from_pretrained(tmp_path / "back")
    before, after = (json.loads((f / "config.json").read_text()) for f in (family.folder / "theirs", tmp_path / "back"))
    differing = {name for name, value in before.items() if after.get(name, value) != value}
    assert differing <= {"sample_size", "decoder_block_out_channels", "scale_factor_spatial", "scale_factor_temporal"}
    assert after["_class_name"] == before["_class_name"]


@pytest.mark.parametrize("name", CLASSES)
def test_published_sizes(name):
    config = load_config(ROOT / f"configs/{name}_x2.py").model
    with torch.device("meta"):
        theirs = CLASSES[name]()
    stored = json.loads(json.dumps(dict(theirs.config))) | {"_class_name": CLASSES[name].__name__}
    published = diffusers_to_config(stored, ROOT)
    assert published.encoder_fields() == config.encoder_fields()
    expected = {n: tuple(v.shape) for n, v in theirs.state_dict().items()}
    assert {w.name: w.torch_shape for w in weights(published, "diffusers")} == expected


@pytest.mark.parametrize("family", ["flux2"], indirect=True)
def test_flux2_under_its_original_names(family, tmp_path):
    convert(family.folder / "jax", tmp_path / "ours.safetensors", "ldm")
    tensors = load_file(tmp_path / "ours.safetensors")
    assert tensors.pop("bn.num_batches_tracked") == 123
    inner = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    tensors = {re.sub(r"^\w+", lambda m: inner.get(m[0], m[0]), n): x for n, x in tensors.items()}
    save_file(tensors, tmp_path / "ae.safetensors")
    read = read_model(tmp_path / "ae.safetensors")
    assert read.config == family.ours.config
    image = _image()
    np.testing.assert_array_equal(asymvq_jax.encode(read, image), asymvq_jax.encode(family.ours, image))
    with pytest.raises(ConvertError, match="normalised by statistics among its weights; leave out --scaling-factor"):
        describe(tmp_path / "ae.safetensors", {"scaling_factor": 0.5})
    save_file(tensors | {"bn.running_mean": np.zeros(7, np.float32)}, tmp_path / "ae.safetensors")
    with pytest.raises(ConvertError, match=r"bn\.running_mean has 7 channels; expected a square times 8"):
        describe(tmp_path / "ae.safetensors")


def test_an_edited_latent_is_understood(family):
    model, image = family.ours, _image()
    z, seen = np.asarray(asymvq_jax.encode(model, image)), _as_seen(family, image)
    with_noise = seen + np.random.default_rng(1).normal(0, 0.01, seen.shape).astype(np.float32)
    known = {"own": lambda: z, "norm": model.normalization()}
    for array, scaled in ((with_noise, True), (np.moveaxis(with_noise, -1, 1), True), (z, False)):
        reading = understand(array, model.config, image.shape[1:3], **known)
        assert reading.scaled == scaled
        np.testing.assert_allclose(reading.latent, z, atol=0.2)
    with pytest.raises(InputError, match="the latent"):
        understand(seen[..., :-1], model.config, image.shape[1:3], **known)
    if family.name == "flux2":
        with pytest.raises(InputError, match="statistics among the model's weights: give the model"):
            normalization(model.config)
        with pytest.raises(InputError, match="is not that of an unscaled latent"):
            read_latent(seen, model.config, image.shape[1:3], scaled=False, norm=model.normalization())
        with pytest.raises(InputError, match="3 rows and 6 columns: expected multiples of 2"):
            asymvq_jax.normalize_latent(model, jnp.zeros((1, 3, 6, 8)))


def test_what_has_no_other_form_is_refused(family, tmp_path):
    config, factors = family.ours.config, {"scaling_factor": 0.5}
    with pytest.raises(ConvertError, match=r"a configuration with scaling_factor=1\.0, not 0\.5"):
        describe(family.folder / "theirs", factors)
    with pytest.raises(
        ConvertError, match=r"AsymmetricAutoencoderKL cannot hold .*model\.(encoder_layers|latent_patch)"
    ):
        config_to_diffusers(
            dataclasses.replace(config, condition=True, decoder_layers="sd", decoder_channels=(32,) * 3)
        )
    if family.name == "flux2":
        return
    with pytest.raises(
        ConvertError, match="no original form of a model with model.encoder_layers=" + config.encoder_layers
    ):
        convert(family.folder / "jax", tmp_path / "x.safetensors", "ldm")
    with pytest.raises(ConfigError, match="decoder_layers='sd' in both"):
        grow_decoder(config, {}, dataclasses.replace(config, decoder_blocks=2), 0)
    stored = load_file(family.folder / "theirs" / WEIGHTS)
    save_file(stored, tmp_path / "alone.safetensors")
    save_file({"decoder.upsamples.0.residual.0.gamma": stored["decoder.norm_out.gamma"]}, tmp_path / "wan.safetensors")
    for file in ("alone", "wan"):
        with pytest.raises(ConvertError, match=r"is Wan's or Qwen-Image's autoencoder without its config\.json"):
            describe(tmp_path / f"{file}.safetensors")
    fields = config_to_diffusers(config)
    for changes, message in (
        ({"is_residual": True}, "this is Wan 2.2's autoencoder"),
        ({"latents_mean": None}, "missing latents_mean"),
        ({"latents_std": [1, "2"]}, "latents_std=[1, '2'] (expected a list of numbers)"),
        ({"attn_scales": [0.5]}, "attn_scales=[0.5] (expected [])"),
        ({"temperal_downsample": [True]}, "temperal_downsample=[True] (expected 1, ..., and one value fewer)"),
    ):
        with pytest.raises(ConvertError, match=re.escape(message)):
            diffusers_to_config(fields | changes, ROOT)
