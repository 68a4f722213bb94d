"""Stable Diffusion XL's networks and whole pipelines against diffusers and transformers, on tiny random ones."""

import re

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from flax import nnx
from oracles import nchw, nhwc, perturb_norms, relative_error
from test_diffusion import TEXTS, TOLERANCE
from test_generate import NOISE_SCHEDULE, PROMPTS, SIZE, make_tokenizer, make_vae, noise_of, picture_and_mask, set_json
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from asymvq_jax.diffusion import sampling
from asymvq_jax.diffusion.pipeline import describe, load, read_text_encoder, read_unet
from asymvq_jax.diffusion.unet import Added
from asymvq_jax.errors import UserError

# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEEDS = [3, 4]
# XL's structure: the outermost level does not attend, the inner ones have deeper transformers; 6 numbers of 8 channels.
UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "cross_attention_dim": 48 + 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def make_unet(channels):
    torch.manual_seed(1)
    return perturb_norms(UNet2DConditionModel(**UNET, in_channels=channels)).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The parts of a text-to-image and of an inpainting model, and their folders."""
    root = tmp_path_factory.mktemp("xl")
    torch.manual_seed(2)
    sizes = {"num_hidden_layers": 3, "vocab_size": 62, "max_position_embeddings": 20, "eos_token_id": 2}
    vae = make_vae()
    vae.register_to_config(scaling_factor=0.13025)
    shared = {
        "vae": vae,
        "text_encoder": perturb_norms(CLIPTextModel(CLIPTextConfig(**TEXTS["1"], **sizes))).eval(),
        "text_encoder_2": perturb_norms(
            CLIPTextModelWithProjection(CLIPTextConfig(**TEXTS["2"], **sizes, projection_dim=32))
        ).eval(),
        "tokenizer": make_tokenizer(root / "tokenizer"),
        "tokenizer_2": make_tokenizer(root / "tokenizer_2"),
    }
    made = {name: shared | {"unet": make_unet(channels)} for name, channels in (("text", 4), ("inpaint", 9))}
    for name, components in made.items():
        for part, component in components.items():
            component.save_pretrained(root / name / part)
    return root, made


def both(parts, name, kind, scheduler, task):
    root, made = parts
    scheduler.save_pretrained(root / name / "scheduler")
    theirs = kind(**made[name], scheduler=scheduler, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs, load(describe(root / name, task))


def test_unet(parts):
    root, made = parts
    ours = read_unet(root / "text/unet")
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 16, 4), (2, 7, 112)))
    pooled, sizes = (
        rng.normal(size=(2, 32)).astype(np.float32),
        np.float32([[64, 128, 0, 0, 64, 128], [9, 8, 7, 6, 5, 4]]),
    )
    time = np.array([981, 3])
    with torch.no_grad():
        told = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(sizes)}
        expected = made["text"]["unet"](
            nchw(x), torch.from_numpy(time), torch.from_numpy(context), added_cond_kwargs=told
        )
    result = nnx.jit(lambda model, *a: model(*a))(ours, x, jnp.asarray(time), context, Added(pooled, sizes))
    assert relative_error(result, nhwc(expected.sample)) < TOLERANCE
    with pytest.raises(ValueError, match="needs the pooled text and the sizes"):
        ours(jnp.asarray(x), jnp.asarray(time), jnp.asarray(context))


def test_text_encoders(parts):
    root, made = parts
    tokens = np.random.default_rng(0).integers(0, 61, (3, 20))
    # The text ends at the first of the greatest tokens.
    tokens[0, 7:] = tokens[1, 3] = 61
    for name in ("text_encoder", "text_encoder_2"):
        with torch.no_grad():
            expected = made["text"][name](torch.from_numpy(tokens), output_hidden_states=True)
        features, pooled = read_text_encoder(root / "text" / name).both(jnp.asarray(tokens))
        assert relative_error(features, expected.hidden_states[-2].numpy()) < TOLERANCE
        if name == "text_encoder_2":
            assert relative_error(pooled, expected.text_embeds.numpy()) < TOLERANCE


@pytest.mark.parametrize("negative", ["", "red"])
def test_text_to_image(parts, negative):
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading")
    theirs, ours = both(parts, "text", StableDiffusionXLPipeline, scheduler, "text")
    assert ours.autoencoder.config.scaling_factor == 0.13025
    latent = sampling.text_to_image(ours, PROMPTS, SEEDS, SIZE, negative=negative, steps=4, guidance=5)
    expected = nhwc(
        theirs(
            PROMPTS,
            height=SIZE[0],
            width=SIZE[1],
            negative_prompt=[negative] * 2 if negative else None,
            latents=noise_of(SEEDS),
            num_inference_steps=4,
            guidance_scale=5,
            output_type="latent",
        ).images
    )
    np.testing.assert_allclose(np.asarray(latent), expected, rtol=0, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize("name", ["text", "inpaint"])
def test_inpainting(parts, name):
    """With 4 channels, whose picture the loop puts back, and with 9."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**NOISE_SCHEDULE, use_karras_sigmas=True)
    theirs, ours = both(parts, name, StableDiffusionXLInpaintPipeline, scheduler, "inpaint")
    image, mask = picture_and_mask()
    latent = sampling.inpaint(ours, PROMPTS, image, mask, SEEDS, steps=4)
    expected = nhwc(
        theirs(
            PROMPTS,
            image=nchw(image / np.float32(255)),
            mask_image=nchw(mask.astype(np.float32)),
            height=SIZE[0],
            width=SIZE[1],
            latents=noise_of(SEEDS),
            num_inference_steps=4,
            strength=1.0,
            output_type="latent",
        ).images
    )
    np.testing.assert_allclose(np.asarray(latent), expected, rtol=0, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize(
    ("task", "file", "changes", "message"),
    [
        ("text", "model_index.json", {"requires_aesthetics_score": True}, "XL's refiner, which is not supported"),
        ("text", "text_encoder_2/config.json", {"projection_dim": 24}, "expects a pooled text of 32 channels"),
        ("text", "text_encoder_2/config.json", {"eos_token_id": 7}, "eos_token_id=7 (expected 2, or the last"),
        ("edit", "model_index.json", {"force_zeros_for_empty_prompt": True}, "missing image_encoder/config.json"),
    ],
)
def test_what_is_refused(parts, tmp_path, task, file, changes, message):
    folder = tmp_path / "model"
    folder.mkdir()
    diffusers.EulerDiscreteScheduler(**NOISE_SCHEDULE).save_pretrained(parts[0] / "text/scheduler")
    for part in (parts[0] / "text").iterdir():
        if part.name != file.split("/")[0]:
            (folder / part.name).symlink_to(part)
    if "/" in file:
        whole = folder / file.split("/")[0]
        whole.mkdir()
        for each in (parts[0] / "text" / whole.name).iterdir():
            (whole / each.name).write_bytes(each.read_bytes())
    else:
        (folder / file).write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    set_json(file, **changes)(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        describe(folder, task)
