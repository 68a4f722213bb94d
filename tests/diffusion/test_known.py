"""Inpainting by networks that were not made for it, and from what is there: against diffusers' pipeline."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from oracles import nchw, nhwc, perturb_norms
from test_diffusion import TEXTS
from test_generate import (
    NOISE_SCHEDULE,
    PROMPTS,
    SIZE,
    make_tokenizer,
    make_unet,
    make_vae,
    noise_of,
    picture_and_mask,
    run,
)
from transformers import CLIPTextConfig, CLIPTextModel

from asymvq_jax.diffusion import sampling
from asymvq_jax.diffusion.denoising import fresh_noise
from asymvq_jax.diffusion.pipeline import describe, load
from asymvq_jax.files import images

# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEEDS = [3, 4]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A text-to-image model's parts, and the folder that holds them."""
    root = tmp_path_factory.mktemp("any") / "model"
    torch.manual_seed(2)
    text = CLIPTextConfig(**TEXTS["1"], num_hidden_layers=2, vocab_size=62, max_position_embeddings=20)
    made = {
        "vae": make_vae(),
        "text_encoder": perturb_norms(CLIPTextModel(text)).eval(),
        "tokenizer": make_tokenizer(root.parent / "tokenizer"),
        "unet": make_unet(cross_attention_dim=48),
    }
    for name, part in made.items():
        part.save_pretrained(root / name)
    return root, made


def both(parts, scheduler, monkeypatch):
    """diffusers' pipeline, which draws our noise, and ours."""
    root, made = parts
    scheduler.save_pretrained(root / "scheduler")
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = StableDiffusionInpaintPipeline(**made, scheduler=scheduler, **others)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline_stable_diffusion_inpaint, "randn_tensor", lambda *_, **__: noise_of(SEEDS))
    return theirs, load(describe(root, "inpaint"))


def assert_same(theirs, ours, mask, steps, strength=1.0, seen=None, **options):
    image, _ = picture_and_mask()
    latent = sampling.inpaint(ours, PROMPTS, image, mask, SEEDS, steps=steps, strength=strength)
    expected = theirs(
        PROMPTS,
        image=nchw(image / np.float32(255)),
        mask_image=nchw((mask if seen is None else seen).astype(np.float32)),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        strength=strength,
        output_type="latent",
        **options,
    ).images
    expected = nhwc(expected)
    np.testing.assert_allclose(np.asarray(latent), expected, rtol=0, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize(
    ("kind", "changes", "strength"),
    [
        ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, 1.0),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 0.6),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, 1.0),
    ],
)
def test_any_model_inpaints(parts, monkeypatch, kind, changes, strength):
    theirs, ours = both(parts, getattr(diffusers, kind)(**NOISE_SCHEDULE, **changes), monkeypatch)
    assert ours.unet.config.in_channels == 4
    assert_same(theirs, ours, picture_and_mask()[1], 5, strength)


def test_a_stochastic_sampler_draws_from_the_seed(parts, monkeypatch):
    theirs, ours = both(parts, diffusers.EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE), monkeypatch)
    keys, steps = sampling.keys_of(SEEDS), itertools.count()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
        lambda *_, **__: nchw(np.asarray(fresh_noise(keys, next(steps), (8, 16, 4)))),
    )
    assert_same(theirs, ours, picture_and_mask()[1], 5)


def test_greys_join_late(parts, monkeypatch):
    """Differential diffusion: diffusers' pipeline with another mask for each step."""
    theirs, ours = both(parts, diffusers.DPMSolverMultistepScheduler(**NOISE_SCHEDULE), monkeypatch)
    steps, mask = 5, picture_and_mask()[1].astype(np.float32)
    # In squares of the latent's pixels.
    mask *= np.random.default_rng(0).choice([0.1, 0.35, 0.5, 0.9, 1], (2, 8, 16, 1)).repeat(8, 1).repeat(8, 2)
    small = mask[:, ::8, ::8]

    def freed(after):
        return ((small > 0) & (1 - small <= np.float32(after / steps))).astype(np.float32)

    def set_mask(pipeline, i, t, tensors):
        # Once for each way of guidance.
        return {"mask": nchw(np.concatenate([freed(i + 2)] * 2))}

    first = freed(1).repeat(8, 1).repeat(8, 2)
    assert 0 < freed(1).mean() < freed(3).mean() < (mask > 0).mean()
    assert_same(
        theirs, ours, mask, steps, seen=first, callback_on_step_end=set_mask,
        callback_on_step_end_tensor_inputs=["latents", "mask"],
    )  # fmt: skip


def test_a_pixel_of_the_mask_is_not_lost(parts):
    """A masked spot between the latent's samples is painted; where nothing is masked the latent is the picture's."""
    ours = load(describe(parts[0], "inpaint"))
    image, mask = picture_and_mask((32, 32), 1)
    mask = np.zeros_like(mask)
    mask[0, 13, 21] = 1
    latent = np.asarray(sampling.inpaint(ours, ["a fox"], image, mask, [1], steps=2))
    kept = np.asarray(sampling.inpaint(ours, ["a fox"], image, np.zeros_like(mask), [1], steps=2))
    changed = (latent != kept).any(-1)[0]
    assert changed[1, 2]
    assert changed.sum() == 1


def test_command(parts, tmp_path, capsys):
    root, _ = parts
    diffusers.LCMScheduler().save_pretrained(root / "scheduler")
    image, mask = picture_and_mask((32, 32), 1)
    images.write(tmp_path / "image.png", image[0])
    images.write(tmp_path / "mask.png", mask[0].repeat(3, -1) * 128)
    inputs = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--prompt", "a fox", "--soft-mask")
    exact = ("--keep", "exact", "--blend", "none", "--dtype", "float32")
    shared = ("inpaint", root, *inputs, *exact, "--out", tmp_path / "o.png")
    assert run(*shared, "--steps", 4, "--strength", 0.5) == 0
    kept = mask[0, ..., 0] == 0
    np.testing.assert_array_equal(images.read(tmp_path / "o.png")[kept], image[0][kept])
    assert run(*shared, "--steps", 4, "--strength", 0.2) == 2
    assert "strength=0.2: expected more than 0.25, one of 4 steps, to 1" in capsys.readouterr().err
