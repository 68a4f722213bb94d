"""Latents as programs save them: files, layouts and scales."""

import dataclasses
import importlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from flax import nnx
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from asymvq_jax.__main__ import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.files import images
from asymvq_jax.files.tensors import read_latent_file
from asymvq_jax.inference import decode, encode
from asymvq_jax.inference.latents import count_latents, understand, understand_alone
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.models.latent import Normalization

CONFIG = ModelConfig()
Z = np.random.default_rng(0).normal(size=(1, 4, 6, 9)).astype(np.float32)


def _write(path, kind):
    if kind == ".npy":
        np.save(path, Z)
    elif kind == ".npz":
        np.savez_compressed(path, Z)
    elif kind == ".npz with several":
        np.savez(path, latents=Z, seed=np.array(3))
    elif kind == ".safetensors":
        save_file({"latent": Z}, path)
    elif kind == "bfloat16":
        save_torch({"anything": torch.from_numpy(Z).bfloat16()}, path)
    elif kind == "torch tensor":
        torch.save(torch.from_numpy(Z), path)
    elif kind == "torch dictionary":
        torch.save({"samples": torch.from_numpy(Z).half(), "batch_index": [0]}, path)
    elif kind == "torch list":
        torch.save([torch.from_numpy(Z).requires_grad_()], path)
    elif kind == "array in torch":
        torch.save({"out": {"latents": Z}, "mask": Z[0, 0]}, path)
    elif kind == "old torch":
        torch.save(torch.from_numpy(Z), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "kind",
    [
        ".npy", ".npz", ".npz with several", ".safetensors", "bfloat16", "torch tensor", "torch dictionary",
        "torch list", "array in torch", "old torch",
    ],
)  # fmt: skip
def test_files_are_told_by_their_content(tmp_path, kind):
    path = tmp_path / "a.bin"
    with path.open("wb") as stream:
        _write(stream if kind.startswith(".np") or "torch" in kind else path, kind)
    read = read_latent_file(path)
    assert read.scaled is None
    tolerance = 1e-2 if kind in ("bfloat16", "torch dictionary") else 0
    np.testing.assert_allclose(read.values, Z, atol=tolerance, rtol=tolerance)


def test_diffusers_outputs_are_read_and_torch_is_not_needed(tmp_path):
    from diffusers.models.autoencoders.vae import DecoderOutput

    torch.save(DecoderOutput(sample=torch.from_numpy(Z)), tmp_path / "a.pt")
    program = """
        import sys
        from asymvq_jax.files.tensors import read_latent_file
        print(read_latent_file(sys.argv[1]).values.sum(), "torch" in sys.modules)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.pt")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    total, torch_there = done.stdout.split()
    assert abs(float(total) - Z.sum()) < 1e-3
    assert torch_there == "False"


def test_comfyui_says_by_a_mark_that_a_latent_is_not_scaled(tmp_path):
    save_file({"latent_tensor": Z, "latent_format_version_0": np.zeros(0, np.float32)}, tmp_path / "new.latent")
    save_file({"latent_tensor": Z}, tmp_path / "old.latent")
    assert read_latent_file(tmp_path / "new.latent").scaled is False
    assert read_latent_file(tmp_path / "old.latent").scaled is True
    np.testing.assert_array_equal(read_latent_file(tmp_path / "new.latent").values, Z)


class _Stranger:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "kind", ["empty", "objects", "complex", "text", "cut", "two", "nothing", "picture", "code", "none"]
)
def test_other_files_end_in_one_line(tmp_path, kind, capsys):
    path = tmp_path / "a.npy"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        np.save(path, Z)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "two":
        np.savez(tmp_path / "b.npz", one=Z, two=Z)
        (tmp_path / "b.npz").rename(path)
    elif kind == "nothing":
        path.write_bytes(b"no numbers")
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    elif kind == "code":
        torch.save({"latent": _Stranger()}, path)
    elif kind != "none":
        np.save(path, {"objects": np.array([Z, None], object), "complex": Z * 1j, "text": Z.astype(str)}[kind])
    with pytest.raises(InputError, match=rf"^latent {re.escape(str(path))} (?!.*pickle)") as error:
        read_latent_file(path)
    assert kind != "objects" or "it holds Python objects; expected real numbers" in str(error.value)
    assert kind != "cut" or "is not a readable NumPy array" in str(error.value)
    assert kind != "two" or "holds 2 arrays" in str(error.value)
    assert kind != "two" or str(error.value).endswith("expected one; save the latent alone")
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


OWN = np.random.default_rng(1).normal(size=(1, 6, 9, 4)).astype(np.float32) * 5
SIZE = (45, 72)
MASK = np.zeros((*SIZE, 1), np.float32)
MASK[10:30, 20:50] = 1


def _edited(noise=0.3):
    """Another latent under the mask, and roughly the picture's own elsewhere."""
    rng = np.random.default_rng(2)
    edited = OWN + noise * rng.normal(size=OWN.shape).astype(np.float32)
    edited[:, 1:4, 2:7] = 5 * rng.normal(size=(1, 3, 5, 4))
    return edited.astype(np.float32)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize(
    "config", [CONFIG, ModelConfig(scaling_factor=0.13025), ModelConfig(scaling_factor=0.3611, shift_factor=0.1159)]
)
def test_layout_and_scale_are_found(config, layout, scaled):
    edited = _edited()
    stored = (edited - config.shift_factor) * config.scaling_factor if scaled else edited
    stored = stored.transpose(0, 3, 1, 2) if layout == "channels-first" else stored
    reading = understand(stored, config, SIZE, own=lambda: OWN, mask=MASK)
    np.testing.assert_allclose(reading.latent, edited, atol=1e-4)
    assert (reading.layout, reading.scaled, reading.warning) == (layout, scaled, "")
    assert reading.reason == "as the picture's own latent outside the mask"


def test_what_is_told_is_taken():
    def never():
        pytest.fail("the picture was encoded for nothing")

    for scaled in (True, False):
        reading = understand(OWN, CONFIG, SIZE, own=never, mask=MASK, scaled=scaled)
        np.testing.assert_allclose(reading.latent, OWN / CONFIG.scaling_factor if scaled else OWN, rtol=1e-5)
        assert reading.reason == "as given"


def test_a_latent_of_another_picture_is_told_and_taken_as_scaled():
    other = np.random.default_rng(9).normal(size=OWN.shape).astype(np.float32)
    reading = understand(other, CONFIG, SIZE, own=lambda: OWN, mask=MASK)
    assert reading.scaled
    assert "not like the picture's own" in reading.warning
    full = understand(other, CONFIG, SIZE, own=lambda: OWN, mask=np.ones_like(MASK))
    assert (full.scaled, full.warning) == (True, "")


def test_a_shape_of_two_layouts():
    """As high and as wide as it has channels."""
    own = np.random.default_rng(3).normal(size=(1, 4, 4, 4)).astype(np.float32)
    mask = np.zeros((32, 32, 1), np.float32)
    mask[:8, :8] = 1
    for layout, stored in (("channels-last", own), ("channels-first", own.transpose(0, 3, 1, 2))):
        reading = understand(stored * CONFIG.scaling_factor, CONFIG, (32, 32), own=lambda: own, mask=mask)
        assert reading.layout == layout
        np.testing.assert_allclose(reading.latent, own, rtol=1e-5)
        told = understand(stored, CONFIG, (32, 32), layout=layout, scaled=False)
        np.testing.assert_allclose(told.latent, own, rtol=1e-5)
    with pytest.raises(InputError, match="its values do not show which: give --latent-layout"):
        understand(own, CONFIG, (32, 32), own=lambda: own, mask=np.ones_like(mask))
    with pytest.raises(InputError, match="its values do not show which"):
        understand(own, CONFIG, (32, 32))
    # Alike in both: symmetric in its axes.
    same = np.indices((4, 4, 4)).sum(0).astype(np.float32)
    with pytest.raises(InputError, match="its values do not show which"):
        understand(same, CONFIG, (32, 32), own=lambda: same[None], mask=mask)
    # Of another picture altogether.
    other = np.random.default_rng(4).normal(size=(4, 4, 4)).astype(np.float32)
    reading = understand(other, CONFIG, (32, 32), own=lambda: own, mask=mask)
    assert reading.layout == "channels-first"
    assert "read with the channels first" in reading.warning
    assert "--latent-layout" in reading.warning


def test_bfloat16_in_a_safetensors_file_of_numpy(tmp_path):
    save_file({"latent": Z.astype(bfloat16)}, tmp_path / "a.safetensors")
    assert read_latent_file(tmp_path / "a.safetensors").values.dtype == np.float32


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize(
    "config", [CONFIG, ModelConfig(scaling_factor=0.13025), ModelConfig(scaling_factor=0.3611, shift_factor=0.1159)]
)
def test_latents_without_a_picture_are_told_by_shape_and_spread(config, layout, scaled):
    z = np.random.default_rng(3).normal(size=(2, 6, 9, 4)).astype(np.float32) / config.scaling_factor + 0.3
    stored = (z - config.shift_factor) * config.scaling_factor if scaled else z
    stored = stored.transpose(0, 3, 1, 2) if layout == "channels-first" else stored
    reading = understand_alone(stored, config)
    np.testing.assert_allclose(reading.latent, z, atol=1e-4)
    assert (reading.layout, reading.scaled) == (layout, scaled)
    assert "a standard deviation of" in reading.describe()


@pytest.mark.parametrize(
    ("array", "config", "options", "message"),
    [
        (OWN * 0.5, CONFIG, {}, "give --latent-scaled yes or no"),
        (OWN * 0, CONFIG, {}, "give --latent-scaled yes or no"),
        (OWN * 20, CONFIG, {}, "give --latent-scaled yes or no"),
        (OWN / 5, ModelConfig(scaling_factor=0.9), {}, "give --latent-scaled yes or no"),
        (OWN[:, :5], ModelConfig(scaling_factor=1.0), {"layout": "channels-first"}, "expected 4 channels"),
        (OWN[:, :4], CONFIG, {}, "give --latent-layout"),
        (OWN, CONFIG, {"layout": "channels-first"}, "expected 4 channels with the channels first"),
        (OWN[..., :3], CONFIG, {}, "expected 4 channels"),
        (OWN[0, 0], CONFIG, {}, r"expected real numbers, \(b, 4, h, w\)"),
        (OWN * np.nan, CONFIG, {}, "not finite"),
    ],
)
def test_what_is_ambiguous_without_a_picture_is_refused(array, config, options, message):
    with pytest.raises(InputError, match=message):
        understand_alone(array, config, **options)


def test_a_batch_is_called_one_where_one_latent_is_expected():
    message = r"shape \(3, 6, 9, 4\), a batch of 3: expected one; save each latent alone, or .* asymvq decode"
    with pytest.raises(InputError, match=message):
        understand(np.concatenate([OWN] * 3), CONFIG, SIZE)


FLUX = ModelConfig(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
FLUX2 = ModelConfig(latent_channels=32, latent_patch=2, batch_norm_epsilon=1e-4, scaling_factor=1.0)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "module", ["flux.pipeline_flux.FluxPipeline", "qwenimage.pipeline_qwenimage.QwenImagePipeline"]
)
def test_tokens_are_laid_out_as_diffusers_does(module, batched):
    name = module.rpartition(".")
    pipeline = getattr(importlib.import_module(f"diffusers.pipelines.{name[0]}"), name[2])
    seen = torch.randn((1, 16, 6, 8), generator=torch.Generator().manual_seed(0))
    packed = pipeline._pack_latents(seen, 1, 16, 6, 8)
    again = pipeline._unpack_latents(packed, 48, 64, 8).reshape(seen.shape).numpy().transpose(0, 2, 3, 1)
    z = again / FLUX.scaling_factor + FLUX.shift_factor
    tokens = packed.numpy() if batched else packed[0].numpy()
    for reading in (
        understand(tokens, FLUX, (48, 64)),
        understand(tokens, FLUX, (45, 63), own=lambda: z),
        understand_alone(tokens, FLUX, size=(48, 64)),
        understand_alone(np.concatenate([packed.numpy()] * 3), FLUX, size=(48, 64)),
    ):
        np.testing.assert_allclose(reading.latent, np.broadcast_to(z, reading.latent.shape), atol=1e-6)
        assert reading.scaled
    assert "packed, as diffusion models have them" in understand(tokens, FLUX, (48, 64)).describe()
    assert not understand(tokens, FLUX, (48, 64), scaled=False).scaled
    assert count_latents(np.concatenate([packed.numpy()] * 3), FLUX, size=(48, 64)) == 3


def test_tokens_of_flux2_are_its_patches():
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    z = torch.randn((2, 32, 6, 8), generator=torch.Generator().manual_seed(0))
    patches = Flux2Pipeline._patchify_latents(z)
    norm = Normalization(0.3, 2.0, 2)
    tokens = Flux2Pipeline._pack_latents((patches - 0.3) * 2.0).numpy()
    last = z.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(understand_alone(tokens, FLUX2, size=(48, 64), norm=norm).latent, last, atol=1e-6)
    np.testing.assert_allclose(understand(tokens[:1], FLUX2, (48, 64), norm=norm).latent, last[:1], atol=1e-6)
    # Patches may reach beyond the picture.
    assert understand(tokens[:1], FLUX2, (40, 64), norm=norm).latent.shape == (1, 5, 8, 32)


@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
def test_an_axis_of_one_frame_is_left_out(layout):
    """As Wan's and Qwen-Image's autoencoders and ComfyUI's nodes of them have it."""
    z = np.random.default_rng(4).normal(size=(1, 6, 9, 16)).astype(np.float32)
    video = z.transpose(0, 3, 1, 2)[:, :, None] if layout == "channels-first" else z[:, None]
    arrays = [video, video[0]] if layout == "channels-first" else [video]
    for array in arrays:
        for reading in (
            understand(array, FLUX, SIZE, scaled=False),
            understand_alone(array, FLUX, scaled=False),
            understand_alone(array, FLUX, size=SIZE, scaled=False),
        ):
            np.testing.assert_array_equal(reading.latent, z)
            assert reading.layout == layout
        assert count_latents(array, FLUX) == 1
    assert count_latents(np.concatenate([video] * 2), FLUX) == 2


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 16, 21, 6, 9), {}, "21 frames of a video: expected one, a picture"),
        ((1, 12, 64), {}, "give the pictures' size by --size HEIGHTxWIDTH"),
        ((16, 12, 64), {}, "give the pictures' size by --size HEIGHTxWIDTH"),
        ((1, 12, 64), {"size": (64, 64)}, r"expected 16 channels, as the model has; or packed into tokens \(16, 64\)"),
        ((1, 16, 6, 9), {"size": (64, 64)}, r"channels last \(6, 9, 16\): expected \(8, 8, 16\)"),
    ],
)
def test_frames_and_tokens_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(InputError, match=message):
        understand_alone(np.ones(shape, np.float32), FLUX, scaled=True, **options)


def test_tokens_of_another_picture_are_refused():
    with pytest.raises(InputError, match=r"for a picture of 64 x 64 px; or packed into tokens \(16, 64\)"):
        understand(np.ones((1, 12, 64), np.float32), FLUX, (64, 64))


def test_a_picture_as_wide_as_tokens_have_channels_is_read_by_its_layout_or_size():
    z = np.random.default_rng(5).normal(size=(16, 64, 64)).astype(np.float32)
    for told in ({"layout": "channels-first"}, {"size": (512, 512)}):
        np.testing.assert_array_equal(understand_alone(z, FLUX, scaled=False, **told).latent[0], z.transpose(1, 2, 0))


def test_command_line_decodes_what_other_programs_write(tmp_path, capsys, monkeypatch):
    """One picture from every kind of file, and a batch into a directory."""
    monkeypatch.chdir(tmp_path)
    sizes = {"encoder_channels": (8, 8, 8), "decoder_channels": (8, 8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
    model = Autoencoder(ModelConfig(**sizes, norm_groups=4), rngs=nnx.Rngs(0))
    save_model(tmp_path / "model", model)
    scale, model_option = model.config.scaling_factor, ["--checkpoint=model"]
    image = np.linspace(-1, 1, 48 * 80 * 3, dtype=np.float32).reshape(1, 48, 80, 3)
    z = np.asarray(encode(model, image))
    first = np.ascontiguousarray(z.transpose(0, 3, 1, 2))
    expected = images.to_uint8(decode(model, z)[0])
    np.save("jax.npy", z * scale)
    torch.save({"samples": torch.from_numpy(first * scale)}, "diffusers.pt")
    save_file({"latent_tensor": first, "latent_format_version_0": np.zeros(0, np.float32)}, "comfy.latent")
    save_file({"latent_tensor": first * scale}, "old.latent")
    save_file({"latents": first}, "unscaled.safetensors")
    for name, told in (("jax.npy", "yes"), ("diffusers.pt", "yes"), ("comfy.latent", ""), ("old.latent", ""),
                       ("unscaled.safetensors", "no")):  # fmt: skip
        options = [f"--latent-scaled={told}"] if told else []
        assert main(["decode", *model_option, f"--latent={name}", "--out=out.png", *options]) == 0, (
            capsys.readouterr().err
        )
        assert np.abs(images.read("out.png").astype(int) - expected).max() <= 1, name
        assert f"80 x 48 px; latent: channels {'last' if name == 'jax.npy' else 'first'}" in capsys.readouterr().out
    np.save("several.npy", np.concatenate([z, z * 0.5]) * scale)
    assert (
        main(["decode", *model_option, "--latent=several.npy", "--out=many", "--latent-scaled=yes", "--large=strips"])
        == 0
    )
    assert np.abs(images.read("many/0000.png").astype(int) - expected).max() <= 1
    assert (images.read("many/0001.png") != expected).any()
    for options, message in (
        (["--latent=several.npy", "--out=one.png"], "holds 2 latents; expected a directory"),
        (["--latent=jax.npy", "--out=jax.npy"], "would be overwritten"),
        (["--latent=none.npy", "--out=a.png"], "latent none.npy cannot be read"),
        (["--latent=jax.npy", "--out=a.png", "--latent-layout=channels-first"], "channels first, as the model has"),
    ):
        assert main(["decode", *model_option, *options]) == 2
        assert message in capsys.readouterr().err


def test_command_line_decodes_tokens_and_frames(tmp_path, capsys, monkeypatch):
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    monkeypatch.chdir(tmp_path)
    sizes = {"encoder_channels": (8, 8, 8), "decoder_channels": (8, 8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
    model = Autoencoder(dataclasses.replace(FLUX, **sizes, norm_groups=4), rngs=nnx.Rngs(0))
    save_model(tmp_path / "model", model)
    seen = np.random.default_rng(0).normal(size=(2, 16, 12, 20)).astype(np.float32)
    z = seen.transpose(0, 2, 3, 1) / FLUX.scaling_factor + FLUX.shift_factor
    expected = images.to_uint8(decode(model, z[:1])[0])
    np.save("tokens.npy", FluxPipeline._pack_latents(torch.from_numpy(seen), 2, 16, 12, 20).numpy())
    np.save("video.npy", seen[:1, :, None])
    command = ["decode", "--checkpoint=model"]
    assert main([*command, "--latent=tokens.npy", "--out=many", "--size=48x79"]) == 0, capsys.readouterr().err
    assert "2 of 79 x 48 px; latent: channels last, scaled (packed" in capsys.readouterr().out
    assert np.abs(images.read("many/0000.png").astype(int) - expected[:, :79]).max() <= 1
    assert main([*command, "--latent=video.npy", "--out=one.png"]) == 0, capsys.readouterr().err
    assert np.abs(images.read("one.png").astype(int) - expected).max() <= 1
    capsys.readouterr()
    for options, message in (
        (["--latent=tokens.npy", "--out=many"], "give the pictures' size by --size"),
        (["--latent=tokens.npy", "--out=a.png", "--size=48x80"], "holds 2 latents; expected a directory"),
        (["--latent=tokens.npy", "--out=a.png", "--size=64x64"], "or packed into tokens (64, 64)"),
        # Not as if the checkpoint were at fault.
        (["--latent=video.npy", "--out=other"], "error: other: expected a name that ends in one of .png"),
        (["--latent=tokens.npy", "--out=many", "--size=64"], "--size 64: expected HEIGHTxWIDTH"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    image = np.zeros((48, 80, 3), np.uint8)
    images.write("photo.png", image)
    images.write("mask.png", np.pad(np.full((16, 16, 3), 255, np.uint8), ((8, 24), (16, 48), (0, 0))))
    np.save("first.npy", np.load("tokens.npy")[:1])
    inpaint = ["inpaint", "--checkpoint=model", "--image=photo.png", "--mask=mask.png", "--latent=first.npy"]
    assert main([*inpaint, "--out=filled.png"]) == 0, capsys.readouterr().err
    assert images.read("filled.png").shape == (48, 80, 3)
