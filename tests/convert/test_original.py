"""The parts of an original Stable Diffusion checkpoint, by names and shapes alone: which model it is, and how large."""

from pathlib import Path

import numpy as np
import pytest
from test_sources import CONFIG, random_model

from asymvq_jax.convert.mapping import dump_tensors
from asymvq_jax.diffusion.original import find_parts, without_unused
from asymvq_jax.errors import ConvertError, PipelineError
from asymvq_jax.files.stored import StoredTensor
from asymvq_jax.files.weights import Weights

UNET = "model.diffusion_model."


def shapes_of_unet(context, *, linear, width=64):
    """One halving, attention in the outer level, as far as sizes are read off it."""
    projection = (width, width) if linear else (width, width, 1, 1)
    return {
        f"{UNET}input_blocks.0.0.weight": (width, 4, 3, 3),
        f"{UNET}input_blocks.1.0.out_layers.3.weight": (width, width, 3, 3),
        f"{UNET}input_blocks.1.1.norm.weight": (width,),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (width, context),
        f"{UNET}input_blocks.2.0.op.weight": (width, width, 3, 3),
        f"{UNET}input_blocks.3.0.out_layers.3.weight": (2 * width, width, 3, 3),
        f"{UNET}middle_block.1.proj_in.weight": projection,
        f"{UNET}out.2.weight": (4, width, 3, 3),
    }


def shapes_of_text(width, blocks, *, open_clip, prefix=None):
    if open_clip:
        start, block = prefix or "cond_stage_model.model.", "transformer.resblocks"
        shapes = {
            "token_embedding.weight": (99, width),
            "positional_embedding": (77, width),
            "ln_final.weight": (width,),
        }
        inner, joint = "mlp.c_fc.bias", {"attn.in_proj_weight": (3 * width, width)}
    else:
        start, block = prefix or "cond_stage_model.transformer.text_model.", "encoder.layers"
        shapes = {"embeddings.token_embedding.weight": (99, width), "embeddings.position_embedding.weight": (77, width)}
        inner, joint = "mlp.fc1.bias", {"self_attn.q_proj.weight": (width, width)}
    for i in range(blocks):
        shapes |= {f"{block}.{i}.{name}": shape for name, shape in {inner: (4 * width,), **joint}.items()}
    return {start + name: shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def vae():
    return {f"first_stage_model.{n}": x.shape for n, x in dump_tensors(random_model(CONFIG), "ldm").items()}


def opened(shapes, **metadata):
    def load():
        pytest.fail("weights were read")

    tensors = {name: StoredTensor(tuple(shape), "float16", load) for name, shape in shapes.items()}
    return Weights(Path("sd.ckpt"), tensors, metadata)


@pytest.mark.parametrize(
    ("context", "linear", "open_clip", "two"),
    [
        (768, False, False, False),
        # 1, written with linear layers.
        (768, True, False, False),
        (1024, True, True, True),
        # 2, with convolutions and transformers' names.
        (1024, False, False, True),
        (64, True, False, True),
        (64, False, False, False),
    ],
)
def test_stable_diffusion_1_and_2_are_told_apart_by_sizes(context, linear, open_clip, two, vae):
    text = shapes_of_text(context, 12, open_clip=open_clip)
    found = find_parts(opened(vae | shapes_of_unet(context, linear=linear) | text), {})
    assert found.two == two
    assert found.text.transformer.activation == ("gelu" if two else "quick_gelu")
    assert found.unet.heads == ((1, 2) if two else (8, 8))
    assert (found.unet.context, found.text.transformer.channels, found.text.length) == (context, context, 77)
    assert found.autoencoder.config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("blocks", "open_clip", "projected", "used"),
    [
        (24, True, True, 23),
        (24, True, False, 23),
        (23, True, False, 23),
        (23, True, True, 23),
        (24, False, False, 23),
        (23, False, False, 23),
        # Of other sizes: a published file has the projection too.
        (3, True, True, 2),
        (3, True, False, 3),
    ],
)
def test_the_blocks_of_stable_diffusion_2s_text_encoder(blocks, open_clip, projected, used, vae, caplog):
    caplog.set_level("INFO")
    shapes = vae | shapes_of_unet(1024, linear=True) | shapes_of_text(1024, blocks, open_clip=open_clip)
    if projected:
        shapes["cond_stage_model.model.text_projection"] = (1024, 1024)
    found = find_parts(opened(shapes), {})
    assert found.text.transformer.layers == used
    assert f"of the {blocks} blocks" in caplog.text
    numbers = {name.split(".")[2] for name in without_unused(found) if ".resblocks." in name or ".layers." in name}
    assert numbers == {str(i) for i in range(used)}


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "text_encoder.", "te.text_model."])
def test_a_text_encoder_is_found_under_any_prefix(prefix, vae):
    text = shapes_of_text(768, 2, open_clip=False, prefix=prefix)
    text[f"{prefix}embeddings.position_ids"] = (1, 77)
    found = find_parts(opened(vae | shapes_of_unet(768, linear=False) | text), {})
    assert set(found.text_tensors) == {n.removeprefix(prefix) for n in text if "position_ids" not in n}


def test_what_is_of_no_use_is_counted(vae, caplog):
    caplog.set_level("INFO")
    shapes = vae | shapes_of_unet(768, linear=False) | shapes_of_text(768, 2, open_clip=False)
    shapes |= {"embedding_manager.initial.weight": (3,), "model_ema.decay": (), "first_stage_model.loss.logvar": ()}
    find_parts(opened(shapes), {})
    assert "3 tensors are not needed and are not read" in caplog.text
    assert "embedding_manager.*" in caplog.text


def test_what_the_network_predicts_where_the_file_says_it(vae):
    shapes = vae | shapes_of_unet(1024, linear=True) | shapes_of_text(1024, 23, open_clip=True)
    assert find_parts(opened(shapes), {}).prediction is None
    assert find_parts(opened(shapes | {"v_pred": (0,)}), {}).prediction == "v_prediction"
    assert find_parts(opened(shapes, **{"modelspec.prediction_type": "epsilon"}), {}).prediction == "epsilon"


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("model.diffusion_model.joint_blocks.0.x", "is Stable Diffusion 3; only Stable Diffusion 1 and 2"),
        ("model.diffusion_model.double_blocks.0.x", "is FLUX or a transformer of its kind"),
        ("model.diffusion_model.label_emb.0.0.weight", "is Stable Diffusion XL"),
        ("conditioner.embedders.1.model.ln_final.weight", "is Stable Diffusion XL"),
    ],
)
def test_other_families_are_called_by_their_names(beside, message, vae):
    with pytest.raises(PipelineError, match=message):
        find_parts(opened(vae | shapes_of_unet(2048, linear=True) | {beside: (8,)}), {})


def test_parts_that_are_missing(vae):
    unet, text = shapes_of_unet(768, linear=False), shapes_of_text(768, 2, open_clip=False)
    for shapes, message in (
        (vae | text, "missing its UNet"),
        (vae | unet, "missing its text encoder"),
        (unet | text, r"holds no autoencoder: it is a diffusion model without one \(NoVAE\)"),
    ):
        with pytest.raises((PipelineError, ConvertError), match=message):
            find_parts(opened(shapes), {})


def test_joint_projections_are_read_in_three_parts():
    """Lazily, and each only its own rows."""
    joint = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    tensor = StoredTensor((6, 2), "float32", lambda: joint)
    for i in range(3):
        np.testing.assert_array_equal(tensor.part(i, 3).read(), joint[2 * i : 2 * i + 2])
