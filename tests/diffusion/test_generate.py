"""Whole pipelines against diffusers', on tiny random ones that the tests make; and the command."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from diffusers.pipelines.deprecated.paint_by_example import PaintByExamplePipeline
from flax import nnx
from oracles import asymmetric, nchw, nhwc, perturb_norms
from PIL import Image
from processes import DEADLINE
from safetensors.numpy import load_file, save_file
from test_diffusion import TEXTS, torch_image_encoder
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from asymvq_jax import inference
from asymvq_jax.commands.generate import main
from asymvq_jax.config import MeshConfig, ModelConfig
from asymvq_jax.convert.convert import convert
from asymvq_jax.convert.mapping import dump_tensors, to_torch
from asymvq_jax.devices import sharding
from asymvq_jax.diffusion import clip, mapping, sampling
from asymvq_jax.diffusion.pipeline import describe, describe_checkpoint, load
from asymvq_jax.diffusion.tokens import read_tokenizer
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.errors import PipelineError, TensorFileError, TokenizerError
from asymvq_jax.evaluation.pairs import list_pairs, read_pairs
from asymvq_jax.files import images
from asymvq_jax.files.pictures import read_picture
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.models.parameters import split

# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

AUTOENCODER = ModelConfig(
    encoder_channels=(8, 16, 16, 16),
    decoder_channels=(16, 32, 64, 64),
    encoder_blocks=1,
    decoder_blocks=1,
    norm_groups=8,
)
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPTS = ["a red fox", "an old oak tree in the evening"]
SIZE = (64, 128)


def make_tokenizer(folder):
    """CLIP's in form: letters, some merges, and the two marks."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = ["a n", "an d</w>", "o l", "t r", "e e</w>", "tr ee</w>", "r e", "re d</w>"]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=20, pad_token="<|endoftext|>")


def make_vae():
    """The posterior has no spread, so that its sample, which diffusers takes, is its mode, which we take."""
    vae = perturb_norms(asymmetric(AUTOENCODER)).eval()
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -60
    return vae


def make_unet(**config):
    torch.manual_seed(1)
    config = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8, **config}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return perturb_norms(UNet2DConditionModel(attention_head_dim=4, **kinds, **config)).eval()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """diffusers' pipelines by task, and the folder that holds each of them."""
    root = tmp_path_factory.mktemp("pipelines")
    tokenizer = make_tokenizer(root / "tokenizer")
    torch.manual_seed(2)
    text = CLIPTextConfig(**TEXTS["1"], num_hidden_layers=2, vocab_size=62, max_position_embeddings=20)
    shared = {
        "vae": make_vae(),
        "text_encoder": perturb_norms(CLIPTextModel(text)).eval(),
        "tokenizer": tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    ddim = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    pndm = PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True)
    made = {
        "text": StableDiffusionPipeline(unet=make_unet(cross_attention_dim=48), scheduler=ddim, **shared),
        "inpaint": StableDiffusionInpaintPipeline(
            unet=make_unet(cross_attention_dim=48, in_channels=9), scheduler=pndm, **shared
        ),
        "edit": PaintByExamplePipeline(
            vae=shared["vae"],
            image_encoder=torch_image_encoder(),
            unet=make_unet(cross_attention_dim=24, in_channels=9),
            scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE),
            safety_checker=None,
            feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            requires_safety_checker=False,
        ),
    }
    for task, pipeline in made.items():
        pipeline.set_progress_bar_config(disable=True)
        for part in ("vae", "unet", "scheduler", "text_encoder", "tokenizer", "image_encoder"):
            if (component := getattr(pipeline, part, None)) is not None:
                component.save_pretrained(root / task / part)
        if task == "edit":
            pipeline.feature_extractor.save_pretrained(root / task / "feature_extractor")
    return SimpleNamespace(root=root, **made)


@pytest.fixture(scope="module")
def decoder(pipelines, tmp_path_factory):
    """The pipelines' asymmetric autoencoder as a checkpoint of ours."""
    path = tmp_path_factory.mktemp("decoder") / "jax"
    convert(pipelines.root / "text/vae", path)
    return path


def picture_and_mask(size=SIZE, count=2):
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (count, size[0] // 8, size[1] // 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    mask = np.zeros((count, *size, 1), np.uint8)
    # Along the latent's pixels, where diffusers takes one sample of each and we take the greatest.
    mask[0, 8:48, 24:72] = 1
    mask[-1, 32:, 8:40] = 1
    return image, mask


def noise_of(seeds, size=SIZE):
    shape = (size[0] // 8, size[1] // 8, 4)
    return nchw(np.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds]))


def to_uint8(image):
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.int32)


def assert_same_picture(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.ptp(theirs) > 100
    assert np.abs(ours.astype(np.int32) - theirs).max() <= 1


@pytest.mark.parametrize(("guidance", "negative"), [(7.5, "red"), (1.0, "")])
def test_text_to_image(pipelines, guidance, negative):
    ours = load(describe(pipelines.root / "text", "text"))
    latent = sampling.text_to_image(ours, PROMPTS, [3, 4], SIZE, negative=negative, guidance=guidance, steps=5)
    options = {"guidance_scale": guidance, "num_inference_steps": 5, "output_type": "latent"}
    expected = pipelines.text(
        PROMPTS, *SIZE, negative_prompt=[negative] * 2, latents=noise_of([3, 4]), **options
    ).images
    np.testing.assert_allclose(
        np.asarray(latent), nhwc(expected), rtol=0, atol=1e-4 * float(expected.max() - expected.min())
    )
    with torch.no_grad():
        decoded = pipelines.text.vae.decode(expected / AUTOENCODER.scaling_factor).sample
    assert_same_picture(sampling.decode(ours.autoencoder, latent), to_uint8(nhwc(decoded)))


def test_inpainting(pipelines):
    """diffusers' pipeline with the asymmetric decoder at its end, which gets picture and mask."""
    ours = load(describe(pipelines.root / "inpaint", "inpaint"))
    image, mask = picture_and_mask()
    latent = sampling.inpaint(ours, PROMPTS, image, mask, [3, 4], steps=6)
    expected = pipelines.inpaint(
        PROMPTS,
        image=nchw(image / np.float32(255)),
        mask_image=nchw(mask.astype(np.float32)),
        height=SIZE[0],
        width=SIZE[1],
        latents=noise_of([3, 4]),
        num_inference_steps=6,
        output_type="pt",
    ).images
    result = sampling.decode(ours.autoencoder, latent, image, mask)
    assert_same_picture(result, np.round(nhwc(expected) * 255).astype(np.int32))


def test_a_converted_decoder_ends_diffusers_pipeline(pipelines, decoder, tmp_path):
    """As docs/guides/convert.md has it."""
    convert(decoder, tmp_path / "for_diffusers", "diffusers")
    vae = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "for_diffusers")
    parts = pipelines.inpaint.components | {"vae": vae}
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image, mask = picture_and_mask(count=1)
    results = [
        each(
            PROMPTS[:1],
            image=nchw(image / np.float32(255)),
            mask_image=nchw(mask.astype(np.float32)),
            height=SIZE[0],
            width=SIZE[1],
            latents=noise_of([3]),
            num_inference_steps=2,
            output_type="pt",
        ).images
        for each in (pipe, pipelines.inpaint)
    ]
    np.testing.assert_allclose(*map(nhwc, results), rtol=0, atol=1e-5)


def test_editing_by_example(pipelines):
    ours = load(describe(pipelines.root / "edit", "edit"))
    image, mask = picture_and_mask()
    examples = list(np.random.default_rng(6).integers(0, 256, (2, 40, 56, 3), np.uint8))
    latent = sampling.edit(ours, examples, image, mask, [3, 4], steps=7)
    for i in range(2):
        # One by one: with guidance diffusers mixes up a batch's unconditional features.
        expected = pipelines.edit(
            example_image=torch.from_numpy(clip.prepare_example(examples[i], ours.example))[None].permute(0, 3, 1, 2),
            image=nchw(image[i : i + 1] / np.float32(127.5) - 1),
            mask_image=nchw(mask[i : i + 1].astype(np.float32)),
            latents=noise_of([3 + i]),
            num_inference_steps=7,
            output_type="latent",
        ).images
        with torch.no_grad():
            z = expected / AUTOENCODER.scaling_factor
            pixels, m = nchw(image[i : i + 1] / np.float32(127.5) - 1), nchw(mask[i : i + 1].astype(np.float32))
            decoded = pipelines.edit.vae.decode(z, image=pixels, mask=m).sample
        result = sampling.decode(ours.autoencoder, latent[i : i + 1], image[i : i + 1], mask[i : i + 1])
        assert_same_picture(result, to_uint8(nhwc(decoded)))


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (28, 28), (20, 33)])
def test_preparation_of_an_example(shape):
    config = clip.ExampleConfig(size=28)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    image = np.random.default_rng(7).integers(0, 256, (*shape, 3), np.uint8)
    expected = processor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(clip.prepare_example(image, config), expected, rtol=0, atol=1e-5)


def test_same_on_eight_devices_and_in_any_batch(pipelines):
    ours = load(describe(pipelines.root / "inpaint", "inpaint"))
    image, mask = (x.repeat(4, 0) for x in picture_and_mask((32, 32)))
    seeds, prompts = list(range(8)), [PROMPTS[i % 2] for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    split = sampling.inpaint(ours, prompts, image, mask, seeds, steps=3, mesh=mesh)
    assert len({s.device for s in split.addressable_shards}) == 8
    assert split.addressable_shards[0].data.shape[0] == 1
    alone = sampling.inpaint(ours, prompts[5:6], image[5:6], mask[5:6], seeds[5:6], steps=3)
    np.testing.assert_allclose(np.asarray(split)[5:6], np.asarray(alone), rtol=0, atol=1e-5 * np.ptp(np.asarray(alone)))
    decoded = sampling.decode(ours.autoencoder, split, image, mask, mesh=mesh)
    assert_same_picture(decoded[5:6], sampling.decode(ours.autoencoder, alone, image[5:6], mask[5:6]).astype(np.int32))
    with pytest.raises(inference.InputError, match="the batch has 3 pictures, which 8 devices cannot split evenly"):
        sampling.decode(ours.autoencoder, split[:3], mesh=mesh)


def test_any_size_of_picture(pipelines):
    ours = load(describe(pipelines.root / "inpaint", "inpaint"))
    image, mask = picture_and_mask((72, 104))
    latent = sampling.inpaint(ours, PROMPTS, image[:, :67, :99], mask[:, :67, :99], [1, 2], steps=2)
    assert latent.shape == (2, 9, 13, 4)
    assert sampling.decode(ours.autoencoder, latent, image[:, :67, :99], mask[:, :67, :99]).shape == (2, 67, 99, 3)


def run(*arguments):
    return main([str(a) for a in arguments])


def test_command_text(pipelines, decoder, tmp_path, capsys):
    shared = ("--steps", 2, "--size", "32x48", "--batch", 2, "--dtype", "float32", "--decoder", decoder)
    assert run("text", pipelines.root / "text", "--prompt", "a fox", "--out", tmp_path / "fox.png", *shared) == 0
    assert images.read(tmp_path / "fox.png").shape == (32, 48, 3)
    options = ("--count", 3, "--out", tmp_path / "many", "--save-latents", tmp_path / "latents", "--decode", "both")
    assert run("text", pipelines.root / "text", "--prompt", "a fox", *options, *shared) == 0
    assert sorted(p.name for p in (tmp_path / "many").glob("*.png")) == ["0000.png", "0001.png", "0002.png"]
    assert np.load(tmp_path / "latents/0002.npy").shape == (4, 6, 4)
    first = images.read(tmp_path / "many/0000.png")
    assert first.shape[1] > 2 * 48
    # A run that was cut off makes the missing pictures, and those alone, as they would have been in another batch.
    second, latent = (tmp_path / "many/0001.png").read_bytes(), np.load(tmp_path / "latents/0002.npy")
    (tmp_path / "many/0001.png").unlink()
    (tmp_path / "latents/0002.npy").unlink()
    assert run("text", pipelines.root / "text", "--prompt", "a fox", *options, *shared) == 2
    assert "has 0002.png and 0 more without a latent in" in capsys.readouterr().err
    (tmp_path / "many/0002.png").unlink()
    (tmp_path / "many/0000.png").write_bytes(b"kept")
    assert run("text", pipelines.root / "text", "--prompt", "a fox", *options, *shared) == 0
    assert (tmp_path / "many/0001.png").read_bytes() == second
    np.testing.assert_allclose(np.load(tmp_path / "latents/0002.npy"), latent, rtol=0, atol=1e-5)
    assert (tmp_path / "many/0000.png").read_bytes() == b"kept"


def test_a_single_picture_is_made_anew(pipelines, tmp_path):
    """By the pipeline's own decoder, and by the same one as a diffusers folder."""
    shared = ("--steps", 1, "--size", "32x32", "--batch", 1, "--dtype", "float32", "--out", tmp_path / "fox.png")
    made = []
    for options in (("--seed", 1), ("--seed", 2), ("--seed", 2, "--decoder", pipelines.root / "text/vae")):
        assert run("text", pipelines.root / "text", "--prompt", "a fox", *shared, *options) == 0
        made.append(images.read(tmp_path / "fox.png"))
    assert (made[0] != made[1]).any()
    np.testing.assert_array_equal(made[1], made[2])


def test_command_folder(pipelines, decoder, tmp_path):
    """Pictures of two sizes; the latents beside the pairs are what eval.py takes."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, size in (("a", (40, 48)), ("b", (64, 64)), ("c", (40, 48))):
        image, mask = picture_and_mask((64, 64))
        images.write(folder / f"{name}.png", image[0, : size[0], : size[1]])
        images.write(folder / f"{name}_mask.png", (mask[0, : size[0], : size[1]] * 255).repeat(3, -1))
        (folder / f"{name}.txt").write_text("a fox\n")
    options = ("--folder", folder, "--out", tmp_path / "out", "--steps", 2, "--batch", 2, "--save-latents", folder)
    assert run("inpaint", pipelines.root / "inpaint", *options, "--decoder", decoder) == 0
    assert images.read(tmp_path / "out/c.png").shape == (40, 48, 3)
    pairs = list(read_pairs(list_pairs(str(folder))))
    assert [pair.name for pair in pairs] == ["a.png", "b.png", "c.png"]
    for pair in pairs:
        inference.read_latent(pair.latent, AUTOENCODER, pair.image.shape[:2])


def test_processes_share_a_folder(pipelines, decoder, tmp_path):
    """One is killed, another has its part done already; each picture is what one process alone makes."""
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    for name in "abcde":
        (prompts / f"{name}.txt").write_text(f"a fox {name}")
    out.mkdir()
    (out / "c.png").write_bytes(b"kept")
    options = ["text", pipelines.root / "text", "--folder", prompts, "--steps", 1, "--batch", 1, "--size", "32x32"]
    options = [*map(str, options), "--decoder", str(decoder)]
    command = [sys.executable, "-m", "asymvq_jax.generate", *options, "--out", str(out)]
    started = []
    for i in range(3):
        variables = os.environ | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(i)}
        started.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    try:
        started[0].kill()
        logs = [process.communicate(timeout=DEADLINE)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0, 0], logs
    assert "2 pictures, 1 steps" in logs[1]
    assert f"1 of 1 pictures are in {out} already" in logs[2]
    assert sorted(p.name for p in out.glob("*.png")) == ["b.png", "c.png", "e.png"]
    # What the killed one left, by one process.
    assert run(*options, "--out", out) == 0
    assert (out / "c.png").read_bytes() == b"kept"
    assert run(*options, "--out", tmp_path / "alone") == 0
    for name in "abde":
        assert (out / f"{name}.png").read_bytes() == (tmp_path / "alone" / f"{name}.png").read_bytes()


def test_what_fails_is_named_and_the_rest_is_made(pipelines, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "pairs", tmp_path / "out"
    folder.mkdir()
    image, mask = picture_and_mask((32, 32))
    for name, suffix in (("a", "png"), ("b", "png"), ("c", "jpg")):
        images.write(folder / f"{name}.{suffix}", image[0])
        images.write(folder / f"{name}_mask.png", mask[0].repeat(3, -1) * 255)
        (folder / f"{name}.TXT").write_text("a fox" if name != "c" else "")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:-50])
    images.write(folder / "b_mask.png", np.zeros((32, 32, 3), np.uint8))
    options = ("inpaint", pipelines.root / "inpaint", "--folder", folder, "--out", out, "--steps", 1, "--batch", 2)
    assert run(*options) == 2
    log = capsys.readouterr().err
    for message in (
        "b_mask.png is black: nothing is generated",
        "c.TXT is empty",
        "error: 1 of 3 pictures could not be made:\n",
    ):
        assert message in log
    assert log.rstrip().splitlines()[-1].startswith(f"  {folder}/a.png is not a readable picture")
    assert sorted(p.name for p in out.glob("*.png")) == ["b.png", "c.png"]
    (folder / "a.png").unlink()
    (folder / "a_mask.png").unlink()
    for path in out.iterdir():
        path.unlink()
    inpaint = sampling.inpaint
    monkeypatch.setattr(sampling, "inpaint", lambda *a, **options: inpaint(*a, **options).at[0].set(np.nan))
    assert run(*options, "--save-latents", tmp_path / "latents") == 2
    assert "b: the latent is not finite; try --dtype float32, or less --guidance" in capsys.readouterr().err
    assert [path.name for path in (*out.iterdir(), *(tmp_path / "latents").iterdir())] == ["c.png", "c.npy"]

    def exhaust(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("asymvq_jax.diffusion.generate._make_batch", exhaust)
    assert run(*options) == 2
    assert "b: 2 at once of 32 x 32 px need more memory than the devices have" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(pipelines, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("asymvq_jax.diffusion.generate.load", interrupt)
    options = ("text", pipelines.root / "text", "--prompt", "a fox")
    for target, message in (
        (("--out", tmp_path / "o.png"), "interrupted"),
        (("--out", tmp_path, "--count", 2), "interrupted; the same command makes the pictures that are missing"),
    ):
        assert run(*options, *target) == 130
        assert capsys.readouterr().err.splitlines()[-1] == message


def test_pictures_masks_and_prompts_as_people_have_them(pipelines, tmp_path, monkeypatch, capsys):
    """Hidden companions, other endings, a byte order mark, strokes of one colour, grey and 16 bits; kept exactly by the
    plain decoder."""
    folder, out = tmp_path / "pairs", tmp_path / "out"
    folder.mkdir()
    image, mask = picture_and_mask((32, 32), 1)
    mask[:] = 0
    mask[0, 9:15, 9:15] = 1
    grey = image[0, ..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(image[0]).save(folder / "b.jfif", format="JPEG")
    red = (mask[0] * np.array([255, 0, 0])).astype(np.uint8)
    for name in "ab":
        Image.fromarray(red).save(folder / f"{name}_mask.png")
        (folder / f"{name}.txt").write_bytes(b"\xef\xbb\xbfa fox\r\n")
        (folder / f"._{name}.png").write_bytes(b"\0\5\x16\7")
    prompts = []
    inpaint = sampling.inpaint

    def spy(pipeline, texts, pictures, masks, *rest, **options):
        prompts.extend(texts)
        return inpaint(pipeline, texts, pictures, masks, *rest, **options)

    monkeypatch.setattr(sampling, "inpaint", spy)
    shared = ("--steps", 1, "--batch", 2, "--dtype", "float32")
    exact = ("--keep", "exact", "--band", 0, "--decode", "plain")
    assert run("inpaint", pipelines.root / "inpaint", "--folder", folder, "--out", out, *shared, *exact) == 0
    log = capsys.readouterr().err
    assert prompts == ["a fox", "a fox"]
    assert "left out: 2 hidden (the name begins with a dot)" in log
    assert "mask from red on black, 3.52% generated" in log or "mask from red on black, 4% generated" in log
    kept = mask[0, ..., 0] == 0
    made = read_picture(out / "a.png")
    np.testing.assert_array_equal(made.colour[..., 0][kept], grey[kept])
    assert made.colour.dtype == np.uint16
    assert (made.colour[..., 0][~kept] != grey[~kept]).any()
    np.testing.assert_array_equal(images.read(out / "b.png")[kept], images.read(folder / "b.jfif")[kept])
    # Nothing to generate.
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    single = ("--image", folder / "a.png", "--prompt", "a fox", "--out", tmp_path / "o.png")
    assert (
        run("inpaint", pipelines.root / "inpaint", *single, "--mask", tmp_path / "black.png", *shared[:2], "--batch", 1)
        == 0
    )
    np.testing.assert_array_equal(read_picture(tmp_path / "o.png").colour[..., 0], grey)
    assert "is black: nothing is generated" in capsys.readouterr().err


def test_a_spot_between_the_latent_s_samples_is_painted(pipelines):
    ours = load(describe(pipelines.root / "inpaint", "inpaint"))
    image, _ = picture_and_mask((32, 32), 1)
    spot, grey = np.zeros((1, 32, 32, 1), np.uint8), image.copy()
    spot[0, 9:15, 9:15] = 1
    grey[spot[..., 0] == 1] = 127
    seen = sampling.inpaint(ours, PROMPTS[:1], image, spot, [1], steps=1)
    unseen = sampling.inpaint(ours, PROMPTS[:1], grey, spot * 0, [1], steps=1)
    lost = sampling.inpaint(ours, PROMPTS[:1], image, spot * 0, [1], steps=1)
    assert np.abs(seen - lost).max() > 5 * np.abs(unseen - lost).max()
    for wrong in (spot * 255, spot.astype(np.float32) - 1):
        with pytest.raises(sampling.SamplingError, match=r"expected 0 \(preserve\) to 1"):
            sampling.inpaint(ours, PROMPTS[:1], image, wrong, [1], steps=1)
    np.testing.assert_array_equal(sampling.inpaint(ours, PROMPTS[:1], image, spot.astype(bool), [1], steps=1), seen)
    with pytest.raises(sampling.SamplingError, match="image of type float32"):
        sampling.inpaint(ours, PROMPTS[:1], image / np.float32(255), spot, [1], steps=1)


def test_command_edit(pipelines, tmp_path):
    image, mask = picture_and_mask((32, 32))
    images.write(tmp_path / "image.png", image[0])
    images.write(tmp_path / "image_mask.png", mask[0].repeat(3, -1) * 255)
    images.write(tmp_path / "image_example.png", image[0, :20])
    list_pairs(str(tmp_path))
    inputs = ["--image", tmp_path / "image.png", "--mask", tmp_path / "image_mask.png"]
    inputs += ["--example", tmp_path / "image_example.png", "--steps", 2, "--batch", 1, "--size", "48x32"]
    made = {}
    for way in ("plain", "asymmetric"):
        out = tmp_path / "out" / f"{way}.png"
        assert run("edit", pipelines.root / "edit", *inputs, "--decode", way, "--out", out) == 0
        made[way] = images.read(out)
        assert made[way].shape == (48, 32, 3)
    # Plain also where the pipeline's own autoencoder could see the picture.
    assert np.abs(made["plain"].astype(int) - made["asymmetric"]).max() > 20


def original_networks(in_channels, *, open_clip):
    """A UNet and a text encoder with Stable Diffusion 1's peculiarities, or with OpenCLIP 2's."""
    config = UNetConfig(
        in_channels=in_channels,
        channels=(64, 128),
        blocks=1,
        attention=(True, False),
        heads=(1, 2) if open_clip else (8, 8),
        context=64,
        sample_size=96 if open_clip else 64,
    )
    transformer = clip.TransformerConfig(64, 96, 2, 1, "gelu" if open_clip else "quick_gelu", 1e-5)
    text = clip.TextEncoder(clip.TextConfig(transformer, 62, 20), rngs=nnx.Rngs(1))
    return UNet(config, rngs=nnx.Rngs(0)), text


def save_checkpoint(path, unet, text, *, open_clip):
    """A whole original checkpoint: our parameters under the table's names, and what else such files hold."""
    sizes = {"encoder_channels": (32,) * 4, "decoder_channels": (32,) * 4, "condition": False, "norm_groups": 32}
    vae = Autoencoder(dataclasses.replace(AUTOENCODER, **sizes), rngs=nnx.Rngs(2))
    tensors = {f"first_stage_model.{n}": x for n, x in dump_tensors(vae, "ldm").items()}
    form, prefix = ("ldm", "model.") if open_clip else ("diffusers", "transformer.text_model.")
    for start, model, named in (
        ("model.diffusion_model.", unet, mapping.unet_weights(unet, "ldm")),
        (f"cond_stage_model.{prefix}", text, mapping.text_weights(text, form)),
    ):
        params = split(model)[1]
        tensors |= {start + w.name: to_torch(w, np.asarray(params[w.path])) for w in named}
    for name in tensors:
        if not open_clip and name.startswith("model.") and name.endswith(("proj_in.weight", "proj_out.weight")):
            tensors[name] = tensors[name][:, :, None, None]
    if open_clip:
        blocks = "cond_stage_model.model.transformer.resblocks."
        for i in range(2):
            for kind in ("weight", "bias"):
                parts = [tensors.pop(f"{blocks}{i}.attn.{p}_proj.{kind}") for p in "qkv"]
                tensors[f"{blocks}{i}.attn.in_proj_{kind}"] = np.concatenate(parts)
        last = {n.replace(f"{blocks}1.", f"{blocks}2."): x for n, x in tensors.items() if n.startswith(f"{blocks}1.")}
        tensors |= {n: x + 1 for n, x in last.items()}
        tensors["cond_stage_model.model.text_projection"] = np.zeros((64, 64), np.float32)
    save_file({"betas": np.zeros(3, np.float32), **tensors}, path)
    return {n: torch.from_numpy(x.copy()) for n, x in tensors.items()}


def assert_converted(theirs, model, named):
    """What diffusers makes of an original file is what our table says the model's parameters are called there."""
    params = split(model)[1]
    for weight in named:
        expected = to_torch(weight, np.asarray(params[weight.path]))
        np.testing.assert_array_equal(theirs[weight.name].numpy().reshape(expected.shape), expected, weight.name)


@pytest.mark.parametrize("open_clip", [False, True], ids=["1", "2"])
def test_original_checkpoint(pipelines, open_clip, tmp_path):
    """Sizes are read off the tensors; the names are those that diffusers knows."""
    unet, text = original_networks(9, open_clip=open_clip)
    path, tokenizer = tmp_path / "sd.safetensors", str(pipelines.root / "tokenizer")
    tensors = save_checkpoint(path, unet, text, open_clip=open_clip)
    told = {"prediction_type": "v_prediction"} if open_clip else {}
    read = load(describe_checkpoint(path, "inpaint", tokenizer, **told))
    assert (read.unet.config, read.text_encoder.config) == (unet.config, text.config)
    assert read.scheduler.prediction_type == ("v_prediction" if open_clip else "epsilon")
    for ours, original in ((read.unet, unet), (read.text_encoder, text)):
        expected = split(original)[1]
        for name, value in split(ours)[1].items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]), err_msg=name)
    theirs = {
        "layers_per_block": 1,
        "class_embed_type": None,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    converted = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), theirs)
    assert_converted(converted, unet, mapping.unet_weights(unet, "diffusers"))
    assert len(converted) == len(split(unet)[1])
    if open_clip:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
        converted = single_file_utils.convert_open_clip_checkpoint(model, tensors)
        converted = {n.removeprefix("text_model."): x for n, x in converted.items()}
        assert_converted(converted, text, mapping.text_weights(text, "diffusers"))
        # OpenCLIP fills up with token 0, and the folder says another.
        assert read.tokenizer(["a fox"])[0, -1] == 0
        assert read_tokenizer(pipelines.root / "tokenizer", text.config)(["a fox"])[0, -1] != 0
        with pytest.raises(PipelineError, match="--prediction-type epsilon"):
            describe_checkpoint(path, "inpaint", tokenizer)
    with pytest.raises(PipelineError, match="in_channels=9, which is an inpainting model; 'text' needs 4"):
        describe_checkpoint(path, "text", tokenizer, **told)


def test_command_on_an_original_checkpoint(pipelines, tmp_path, monkeypatch, capsys):
    unet, text = original_networks(4, open_clip=False)
    path, out = tmp_path / "sd.safetensors", tmp_path / "fox.png"
    save_checkpoint(path, unet, text, open_clip=False)
    inputs = ("text", path, "--prompt", "a fox", "--steps", 1, "--size", "32x32", "--batch", 1, "--out", out)
    tokenizer = ("--tokenizer", pipelines.root / "tokenizer")
    assert run(*inputs, *tokenizer) == 0
    assert images.read(out).shape == (32, 32, 3)
    # A model of 4 channels inpaints as well.
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:24, 8:24] = 255
    images.write(tmp_path / "mask.png", mask)
    pairs = ("--image", out, "--mask", tmp_path / "mask.png", "--prompt", "a fox", "--out", tmp_path / "o.png")
    assert run("inpaint", path, *pairs, *tokenizer, "--steps", 1) == 0
    assert images.read(tmp_path / "o.png").shape == (32, 32, 3)
    monkeypatch.setattr("asymvq_jax.files.stored.StoredTensor.read", lambda *_: pytest.fail("weights were read"))
    for options, message in (
        ((), "has no tokenizer: name one by --tokenizer"),
        (("--tokenizer", tmp_path), "no tokenizer at"),
        ((*tokenizer, "--decode", "both"), "needs an asymmetric decoder: name its checkpoint by --checkpoint"),
        ((*tokenizer, "--size", "33x64"), "expected multiples of 16 px"),
        ((*tokenizer, "--steps", 1000), "steps=1000: expected 1 to 999"),
    ):
        assert run(*inputs, *options) == 2
        assert message in capsys.readouterr().err
    assert run("text", tmp_path / "none.safetensors", "--prompt", "a fox", "--out", out) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert run("edit", path, "--image", out, "--mask", out, "--example", out, "--out", tmp_path / "o.png") == 2
    assert "'edit' takes a diffusers pipeline folder of Paint-by-Example" in capsys.readouterr().err


def age(folder):
    """Rewrites a pipeline's folder as old ones on the hub are: names, half precision, shards, what configs lack."""
    text = load_file(folder / "text_encoder/model.safetensors")
    positions = {"text_model.embeddings.position_ids": np.arange(20)[None]}
    save_file({f"text_model.{n}": x for n, x in text.items()} | positions, folder / "text_encoder/model.safetensors")
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    half = {n: x.astype(np.float16) for n, x in unet.items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    shards = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(vae)}
    for shard in set(shards.values()):
        save_file({n: x for n, x in vae.items() if shards[n] == shard}, folder / "vae" / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for file, changes, dropped in (
        ("scheduler/scheduler_config.json", {"trained_betas": None}, ("steps_offset", "clip_sample")),
        (
            "unet/config.json",
            {"_diffusers_version": "0.6.0", "sample_size": 32, "mid_block_only_cross_attention": False},
            (),
        ),
    ):
        stored = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({n: v for n, v in stored.items() if n not in dropped}))


def test_old_folders_of_the_hub(pipelines, tmp_path, caplog):
    """Read as today's are, and as diffusers' pipelines read them."""
    shutil.copytree(pipelines.root / "text", tmp_path / "old")
    age(tmp_path / "old")
    new, old = (describe(path, "text") for path in (pipelines.root / "text", tmp_path / "old"))
    assert "sample_size=32 is read as 64" in caplog.text
    assert old.unet == dataclasses.replace(new.unet, sample_size=64)
    assert old.scheduler == new.scheduler
    expected, read = load(new), load(old)
    for part, tolerance in (("unet", 1e-3), ("text_encoder", 0), ("autoencoder", 0)):
        (_, theirs), (_, ours) = split(getattr(expected, part)), split(getattr(read, part))
        for name, value in theirs.items():
            np.testing.assert_allclose(np.asarray(ours[name]), np.asarray(value), rtol=tolerance, atol=tolerance)
    (tmp_path / "old/vae/part-1.safetensors").unlink()
    with pytest.raises(TensorFileError, match="names files that are not there: part-1"):
        describe(tmp_path / "old", "text")


def set_json(file, **values):
    def change(folder):
        stored = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**stored, **values}))

    return change


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("text", lambda f: [shutil.rmtree(p) for p in f.iterdir()], "is not a diffusers pipeline folder"),
        ("text", lambda f: shutil.rmtree(f / "tokenizer"), "is not complete for 'text': missing tokenizer"),
        ("inpaint", lambda f: shutil.rmtree(f / "text_encoder"), "missing text_encoder/config.json"),
        ("edit", lambda f: shutil.rmtree(f / "image_encoder"), "missing image_encoder/config.json"),
        ("text", lambda f: [p.unlink() for p in (f / "unet").glob("*.safetensors")], "but no diffusion_pytorch_model"),
        ("text", set_json("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type='sample'"),
        ("text", set_json("scheduler/scheduler_config.json", _class_name="KDPM2DiscreteScheduler"), "--scheduler ddim"),
        (
            "inpaint",
            set_json("unet/config.json", in_channels=5),
            "in_channels=5, which is a model for another task; 'inpaint' needs 9 or 4",
        ),
        ("text", set_json("unet/config.json", in_channels=9), "in_channels=9, which is an inpainting model"),
        ("text", set_json("unet/config.json", cross_attention_dim=99), "features of 99 channels"),
    ],
)
def test_pipelines_that_cannot_do_the_task(pipelines, tmp_path, monkeypatch, capsys, task, change, message):
    """Before any weight is read."""
    monkeypatch.setattr("asymvq_jax.diffusion.generate.load", lambda *_: pytest.fail("weights were read"))
    image, mask = picture_and_mask((32, 32))
    images.write(tmp_path / "image.png", image[0])
    images.write(tmp_path / "mask.png", mask[0].repeat(3, -1) * 255)
    inputs = ["--example", tmp_path / "image.png"] if task == "edit" else ["--prompt", "a fox"]
    if task != "text":
        inputs += ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"]
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines.root / task, folder)
    change(folder)
    assert run(task, folder, *inputs, "--out", tmp_path / "o.png") == 2
    assert message in capsys.readouterr().err


def test_bad_input(pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asymvq_jax.diffusion.generate.load", lambda *_: pytest.fail("weights were read"))
    image, mask = picture_and_mask((32, 32))
    images.write(tmp_path / "image.png", image[0])
    images.write(tmp_path / "mask.png", mask[0, :24].repeat(3, -1) * 255)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("ä".encode("latin-1"))
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "a.jpg"):
        images.write(tmp_path / "twice" / name, image[0])
    prompt, out = ("--prompt", "a fox"), ("--out", tmp_path / "o.png")
    many = ("--folder", tmp_path / "twice", "--out", tmp_path / "d")
    text, pairs = ("text", pipelines.root / "text"), ("inpaint", pipelines.root / "inpaint")
    picture = ("--image", tmp_path / "image.png")
    for arguments, message in (
        ((*pairs, *prompt, *out, *picture, "--mask", tmp_path / "mask.png"), "must have the same size"),
        ((*pairs, *prompt, *out, *picture), "inpaint needs --mask, or --folder"),
        ((*pairs, *prompt, *out, *picture, "--mask", tmp_path / "none.png"), "no picture at"),
        ((*text, *out), "text needs --prompt, or --folder"),
        ((*text, *prompt, "--out", tmp_path / "o.gif"), "expected a name that ends in one of"),
        ((*text, *prompt, *out, "--count", 2), "expected a directory for more than one picture"),
        ((*text, *prompt, *out, "--steps", 0), "--steps 0: expected 1 or more"),
        ((*text, *prompt, *out, "--size", "64"), "expected HEIGHTxWIDTH"),
        ((*text, *prompt, *out, "--size", "0x64"), "expected HEIGHTxWIDTH"),
        ((*text, *prompt, *out, "--size", "33x64"), "expected multiples of 16 px, such as 32 x 64"),
        ((*text, *prompt, *out, "--steps", 1000), "steps=1000: expected 1 to 999, for 1000 timesteps"),
        ((*text, *prompt, *out, "--tokenizer", tmp_path), "is for original checkpoints"),
        ((*text, *prompt, *out, "--prediction-type", "epsilon"), "is for original checkpoints"),
        ((*text, *prompt, *out, "--folder", tmp_path), f"--folder {tmp_path} replaces --prompt: give only one of them"),
        ((*text, "--out", tmp_path / "d", "--folder", tmp_path, "--count", 2), "--count 2 does not go with --folder"),
        ((*text, "--out", tmp_path / "d", "--folder", tmp_path / "latin"), "a.txt is not readable text (UTF-8)"),
        ((*text, "--out", tmp_path / "d", "--folder", tmp_path / "prompts"), "holds no name.txt"),
        (("text", tmp_path / "none", *prompt, *out), "no pipeline at"),
        ((*text, *prompt, *out, "--seed", -1), "--seed -1: expected 0 to 4294967295"),
        ((*text, *prompt, "--out", tmp_path / "d", "--seed", 2**32 - 2, "--count", 3), "expected 0 to 4294967293"),
        ((*text, *prompt, *out, "--guidance", "nan"), "--guidance nan: expected 0 to 100"),
        ((*text, *prompt, *out, "--guidance", -3), "--guidance -3.0: expected 0 to 100"),
        (
            (*text, *prompt, *out, "--negative", "red", "--guidance", 1),
            "--negative has no effect with --guidance 1: expected",
        ),
        ((*pairs, *prompt, *picture, "--mask", tmp_path / "image.png", "--out", tmp_path / "image.png"), "overwritten"),
        ((*pairs, *prompt, *picture, "--mask", tmp_path / "image.png", "--out", "o.jpg", "--keep", "exact"), "JPEG"),
        (
            (*pairs, *many, "--size", "32x32", "--save-latents", tmp_path / "twice"),
            "latents do not have the size of the pictures there",
        ),
        ((*pairs, *many), "twice/a.jpg and a.png have the same name but for the ending"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_arrays_that_do_not_fit(pipelines):
    """The functions that scripts call."""
    ours = load(describe(pipelines.root / "inpaint", "inpaint"))
    image, mask = picture_and_mask((32, 32))
    mesh = sharding.make_mesh(MeshConfig())
    for arguments, options, message in (
        ((PROMPTS, image, mask[:, :24], [1, 2]), {}, "mask (2, 24, 32, 1): expected (2, h, w, 3) and (2, h, w, 1)"),
        ((PROMPTS, image[:1], mask, [1, 2]), {}, "image (1, 32, 32, 3)"),
        ((PROMPTS, image, mask, [1]), {}, "2 pictures and 1 seeds"),
        ((PROMPTS, image, mask, [1, 2]), {"mesh": mesh}, "2 pictures cannot be split evenly over 8 devices"),
    ):
        with pytest.raises(sampling.SamplingError, match=re.escape(message)):
            sampling.inpaint(ours, *arguments, **options)
    with pytest.raises(sampling.SamplingError, match="was loaded for 'inpaint'; load it for 'text'"):
        sampling.text_to_image(ours, PROMPTS, [1, 2], SIZE)
    with pytest.raises(sampling.SamplingError, match=re.escape("expected (2, h, w, 3)")):
        sampling.decode(ours.autoencoder, np.zeros((2, 4, 4, 4), np.float32), image[:1], mask)


def test_decoders_that_cannot_do_the_task(pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("asymvq_jax.diffusion.generate.load", lambda *_: pytest.fail("weights were read"))
    other = dataclasses.replace(AUTOENCODER, scaling_factor=0.5)
    save_model(tmp_path / "other", Autoencoder(other, rngs=nnx.Rngs(0)))
    plain = dataclasses.replace(AUTOENCODER, condition=False)
    save_model(tmp_path / "plain", Autoencoder(plain, rngs=nnx.Rngs(0)))
    image, mask = picture_and_mask((32, 32))
    images.write(tmp_path / "image.png", image[0])
    images.write(tmp_path / "mask.png", mask[0].repeat(3, -1) * 255)
    prompt, out = ("--prompt", "a fox"), ("--out", tmp_path / "o.png")
    pair = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    for task, inputs, decoder, message in (
        ("text", prompt, tmp_path / "other", "scaling_factor=0.5 (the pipeline's: 0.18215)"),
        ("inpaint", (*prompt, *pair), tmp_path / "plain", "has no condition branch, so it cannot preserve"),
        ("text", prompt, tmp_path / "none", "no checkpoint at"),
    ):
        assert run(task, pipelines.root / task, *inputs, *out, "--decoder", decoder) == 2
        assert message in capsys.readouterr().err


def test_long_text_is_cut_with_a_warning(pipelines, caplog):
    config = clip.TextConfig(clip.TransformerConfig(8, 8, 1, 1, "gelu", 1e-5), vocabulary=62, length=20)
    tokens = read_tokenizer(pipelines.root / "tokenizer", config)(["a fox", "a tree " * 12 + "red"])
    assert tokens.shape == (2, 20)
    assert "is cut; left out: " in caplog.text
    with pytest.raises(TokenizerError, match="has 62 tokens; the text encoder has only 50"):
        read_tokenizer(pipelines.root / "tokenizer", dataclasses.replace(config, vocabulary=50))
    with pytest.raises(TokenizerError, match="expected a folder with"):
        read_tokenizer(pipelines.root / "text", config)


def test_command_crop_and_stitch(pipelines, tmp_path, capsys):
    """Only the mask's surroundings go through the model; all other pixels are the original's."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)
    mask = np.zeros((70, 90), np.uint8)
    mask[30:50, 40:60] = 255
    images.write(tmp_path / "a.png", image)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    folder = pipelines.root / "inpaint"
    inputs = ("--image", tmp_path / "a.png", "--mask", tmp_path / "mask.png", "--prompt", "a fox", "--steps", 1)
    options = (*inputs, "--batch", 1, "--dtype", "float32", "--out", tmp_path / "o.png")
    crop = ("--crop-and-stitch", "--work-size", 32)
    assert run("inpaint", folder, *options, *crop, "--save-latents", tmp_path / "latents") == 0
    out = images.read(tmp_path / "o.png")
    np.testing.assert_array_equal(out[mask == 0], image[mask == 0])
    assert (out[mask > 0] != image[mask > 0]).mean() > 0.5
    factor = describe(folder, "inpaint").autoencoder.downsampling
    assert np.load(tmp_path / "latents" / "o.npy").shape[:2] == (32 // factor, 32 // factor)
    for wrong, message in (
        ((*crop, "--size", "32x32"), "--size 32x32 does not go with --crop-and-stitch"),
        (("--work-size", 32), "which is missing"),
        ((*crop, "--keep", "model"), "does not go with --crop-and-stitch"),
        (("--crop-and-stitch", "--work-size", 33), "expected a multiple of"),
    ):
        assert run("inpaint", folder, *options, *wrong) == 2
        assert message in capsys.readouterr().err
