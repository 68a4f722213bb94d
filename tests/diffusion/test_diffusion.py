"""The networks of Stable Diffusion against diffusers and transformers, in float32 on random weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from oracles import nchw, nhwc, perturb_norms, relative_error
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from asymvq_jax.diffusion import layers
from asymvq_jax.diffusion.clip import read_image_config, read_text_config
from asymvq_jax.diffusion.pipeline import read_image_encoder, read_text_encoder, read_unet
from asymvq_jax.diffusion.unet import UNet, UNetConfig, read_config
from asymvq_jax.errors import CLIPError, PipelineError, TensorFileError, UNetError
from asymvq_jax.models.parameters import seeded, split

TOLERANCE = 1e-4
# Stable Diffusion's structure at a tenth of the width: 1 has 1x1 convolutions and as many heads in every level, 2 has
# linear projections and heads of one size.
SMALL = {"block_out_channels": (32, 64, 96, 96), "norm_num_groups": 16, "sample_size": 8}
UNETS = {
    "1": {**SMALL, "cross_attention_dim": 24, "attention_head_dim": 8},
    "1, inpainting": {**SMALL, "cross_attention_dim": 24, "attention_head_dim": 8, "in_channels": 9},
    "2": {**SMALL, "cross_attention_dim": 40, "attention_head_dim": [2, 4, 6, 6], "use_linear_projection": True},
    "shallow": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
}
TEXTS = {
    "1": {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "hidden_act": "quick_gelu"},
    "2": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "hidden_act": "gelu"},
}


def torch_unet(**config):
    torch.manual_seed(0)
    return perturb_norms(UNet2DConditionModel(**config)).eval()


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, tmp_path):
    theirs = torch_unet(**UNETS[name])
    theirs.save_pretrained(tmp_path / "unet")
    ours = read_unet(tmp_path / "unet")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 8, ours.config.in_channels)).astype(np.float32)
    context = rng.normal(size=(2, 7, ours.config.context)).astype(np.float32)
    time = np.array([981, 3])
    with torch.no_grad():
        expected = nhwc(theirs(nchw(x), torch.from_numpy(time), torch.from_numpy(context)).sample)
    assert (
        relative_error(nnx.jit(lambda model, *a: model(*a))(ours, x, jnp.asarray(time), context), expected) < TOLERANCE
    )


def test_unet_in_chunks_of_queries(tmp_path, monkeypatch):
    """Large pictures' attention, the same as the whole."""
    torch_unet(**UNETS["shallow"]).save_pretrained(tmp_path / "unet")
    ours = read_unet(tmp_path / "unet")
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(1, 16, 16, 4)).astype(np.float32), rng.normal(size=(1, 7, 24)).astype(np.float32)
    whole = ours(x, jnp.array([7]), context)
    monkeypatch.setattr(layers, "CACHED_SCORES", 2**11)
    monkeypatch.setattr(layers, "SCORES", 2**11)
    # Four heads' scores have 4 * 64 ** 2 bytes each: one after another, in eight chunks.
    loops = re.findall(r"scan\[.*?length=(\d+)", str(jax.make_jaxpr(ours)(x, jnp.array([7]), context)), re.DOTALL)
    assert {"4", "8"} <= set(loops)
    assert relative_error(ours(x, jnp.array([7]), context), whole) < 1e-6


def test_flash_attention():
    """A TPU's kernel, interpreted, against the formula; elsewhere `attend` does without it."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, 1024, 2, 40)), jnp.bfloat16) for _ in range(3)]
    query, key, value = (torch.from_numpy(np.array(x.astype(jnp.float32))).swapaxes(1, 2) for x in inputs)
    expected = functional.scaled_dot_product_attention(query, key, value).swapaxes(1, 2).numpy()
    with pltpu.force_tpu_interpret_mode():
        flash = layers._flash(*(x.swapaxes(1, 2) for x in inputs)).swapaxes(1, 2)
    for result in (flash, jax.jit(layers.attend)(*inputs)):
        assert relative_error(result.astype(jnp.float32), expected) < 5e-3
    lowered = {
        p: jax.jit(layers.attend).trace(*inputs).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")
    }
    assert [("tpu_custom_call" in lowered[p]) for p in ("cpu", "tpu")] == [False, True]


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name, tmp_path):
    torch.manual_seed(0)
    config = CLIPTextConfig(**TEXTS[name], num_hidden_layers=3, vocab_size=100, max_position_embeddings=20)
    theirs = perturb_norms(CLIPTextModel(config)).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    ours = read_text_encoder(tmp_path / "text_encoder")
    tokens = np.random.default_rng(0).integers(0, 100, (3, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).last_hidden_state.numpy()
    assert relative_error(ours(jnp.asarray(tokens)), expected) < TOLERANCE


def torch_image_encoder():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=9, num_attention_heads=4, image_size=28, patch_size=7,
        projection_dim=24,
    )  # fmt: skip
    return perturb_norms(PaintByExampleImageEncoder(config)).eval()


def test_image_encoder(tmp_path):
    theirs = torch_image_encoder()
    theirs.save_pretrained(tmp_path / "image_encoder")
    ours = read_image_encoder(tmp_path / "image_encoder")
    assert len(ours.mapper) == 2
    image = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        expected, unconditional = (x.numpy() for x in theirs(nchw(image), return_uncond_vector=True))
    assert relative_error(ours(jnp.asarray(image)), expected) < TOLERANCE
    np.testing.assert_array_equal(np.asarray(ours.unconditional[...]), unconditional)


def test_bfloat16_keeps_the_result_near(tmp_path):
    """Norms and softmax stay in float32; the weights are stored as they are used."""
    torch_unet(**UNETS["shallow"]).save_pretrained(tmp_path / "unet")
    exact, ours = read_unet(tmp_path / "unet"), read_unet(tmp_path / "unet", "bfloat16")
    assert ours.conv_in.kernel[...].dtype == jnp.bfloat16
    assert ours.norm_out.scale[...].dtype == jnp.float32
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(1, 8, 8, 4)).astype(np.float32), rng.normal(size=(1, 7, 24)).astype(np.float32)
    assert 0 < relative_error(ours(x, jnp.array([7]), context), exact(x, jnp.array([7]), context)) < 0.05


def test_safetensors_come_before_pickles(tmp_path):
    """A folder of transformers with both kinds of file."""
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(**TEXTS["1"], num_hidden_layers=1, vocab_size=9, max_position_embeddings=7))
    text.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    read_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TensorFileError, match=r"pytorch_model\.bin"):
        read_text_encoder(tmp_path)


def test_every_tensor_is_accounted_for(tmp_path):
    theirs = torch_unet(**UNETS["shallow"])
    theirs.conv_in.extra = torch.nn.Parameter(torch.zeros(3))
    theirs.conv_out = torch.nn.Conv2d(32, 5, 3)
    del theirs.time_embedding.linear_1.bias
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.raises(PipelineError) as error:
        read_unet(tmp_path / "unet")
    for line in ("missing: time_embedding.linear_1.bias (128,)", "unexpected: conv_in.extra (3,)",
                 "misshapen: conv_out.weight (5, 32, 3, 3), expected (4, 32, 3, 3)", "4 tensors"):  # fmt: skip
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'; expected 'UNet2DConditionModel'"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text' (expected None or 'text_time')"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block=[1, 2, 10] (expected a number"),
        ({"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]}, "up_block_types="),
        ({"layers_per_block": [1, 2]}, "layers_per_block=[1, 2] (expected a number)"),
    ],
)
def test_unets_that_we_do_not_have(changes, message):
    stored = {"_class_name": "UNet2DConditionModel", **UNETS["shallow"]}
    stored = {n: list(v) if isinstance(v, tuple) else v for n, v in stored.items()}
    read_config(stored, "unet/config.json")
    with pytest.raises(UNetError, match=re.escape(f"unet/config.json: {'this' if '=' in message else ''}")) as error:
        read_config({**stored, **changes}, "unet/config.json")
    assert message in str(error.value)


def test_encoders_that_we_do_not_have():
    with pytest.raises(CLIPError, match="model_type is 't5'; expected 'clip_text_model'"):
        read_text_config({"model_type": "t5"}, "text_encoder/config.json")
    with pytest.raises(CLIPError, match=r"hidden_size='768' \(expected a whole number above 0\)"):
        read_text_config({"model_type": "clip_text_model", "hidden_size": "768"}, "text_encoder/config.json")
    assert read_text_config({"model_type": "clip_text_model", "hidden_size": None}, "").transformer.channels == 512
    with pytest.raises(CLIPError, match="hidden_act='relu'"):
        read_image_config({"model_type": "clip_vision_model", "hidden_act": "relu"}, "image_encoder/config.json")


def test_shape_error(tmp_path):
    torch_unet(**UNETS["shallow"]).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=re.escape("expected (b, h, w, 4), h and w multiples of 2")):
        read_unet(tmp_path / "unet")(jnp.zeros((1, 7, 8, 4)), jnp.zeros((1,)), jnp.zeros((1, 7, 24)))


def test_published_sizes():
    """The parameters of Stable Diffusion 1.5's and 2.1's UNets, as counted on diffusers' own modules."""
    one = UNetConfig()
    two = dataclasses.replace(one, context=1024, heads=(5, 10, 20, 20))
    for config, context in ((one, 768), (two, 1024)):
        with torch.device("meta"):
            theirs = sum(p.numel() for p in UNet2DConditionModel(cross_attention_dim=context).parameters())
        shapes = split(nnx.eval_shape(lambda c=config: UNet(c, rngs=seeded(0))))[1]
        assert sum(int(np.prod(x.shape)) for x in shapes.values()) == theirs
