"""LoRA merged at load, against W + weight * alpha / rank * up * down in PyTorch."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from oracles import perturb_norms
from safetensors.torch import save_file
from test_diffusion import TEXTS
from test_generate import NOISE_SCHEDULE, make_tokenizer, make_unet, make_vae, run
from transformers import CLIPTextConfig, CLIPTextModel

from asymvq_jax.diffusion import lora
from asymvq_jax.diffusion.pipeline import describe, load
from asymvq_jax.errors import LoraError
from asymvq_jax.models.parameters import split

RANK = 3
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = f"{ATTENTION}.attn2.to_k"
OUT = f"{ATTENTION}.attn1.to_out.0"
CONV = "up_blocks.1.resnets.0.conv1"
ONE_BY_ONE = "down_blocks.0.attentions.0.proj_in"
TEXT = "encoder.layers.1.self_attn.q_proj"

# Our names of what they change.
PATHS = {
    "down.0.attentions.0.blocks.0.cross_attention.key.kernel": LINEAR,
    "down.0.attentions.0.blocks.0.self_attention.out.kernel": OUT,
    "up.1.blocks.0.conv1.kernel": CONV,
    "down.0.attentions.0.proj_in.kernel": ONE_BY_ONE,
    "blocks.1.attention.query.kernel": TEXT,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora") / "model"
    torch.manual_seed(2)
    text = CLIPTextConfig(**TEXTS["1"], num_hidden_layers=2, vocab_size=62, max_position_embeddings=20)
    parts = {
        "vae": make_vae(),
        "text_encoder": perturb_norms(CLIPTextModel(text)).eval(),
        "tokenizer": make_tokenizer(root.parent / "tokenizer"),
        "unet": make_unet(cross_attention_dim=48),
        "scheduler": DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False),
    }
    for name, part in parts.items():
        part.save_pretrained(root / name)
    return root, parts["unet"], parts["text_encoder"]


def halves(kernel, seed):
    """Up and down of a LoRA for a kernel: (out, r) and (r, in), or (out, r, 1, 1) and (r, in, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn((len(kernel), RANK, *([1] * (kernel.ndim - 2))), generator=generator)
    return up, torch.randn((RANK, *kernel.shape[1:]), generator=generator)


def product(up, down):
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def kernels(model):
    _, unet, text = model
    unets = {name: unet.get_submodule(name).weight for name in (LINEAR, OUT, CONV, ONE_BY_ONE)}
    return {**unets, TEXT: text.get_submodule(TEXT if hasattr(text, "encoder") else f"text_model.{TEXT}").weight}


def kohya(name):
    return ("lora_te_text_model_" if name == TEXT else "lora_unet_") + name.replace(".", "_")


def peft(name):
    return ("text_encoder.text_model." if name == TEXT else "unet.") + name


def old(name):
    if name == TEXT:
        return "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora"
    return "unet." + re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1_lora", name)


def write(model, path, form, alpha=None):
    tensors, metadata = {}, None
    for i, (name, kernel) in enumerate(kernels(model).items()):
        up, down = halves(kernel, i)
        if form == "kohya":
            tensors |= {f"{kohya(name)}.lora_up.weight": up, f"{kohya(name)}.lora_down.weight": down}
            tensors[f"{kohya(name)}.alpha"] = torch.tensor(float(alpha))
        elif form == "peft":
            tensors |= {f"{peft(name)}.lora_B.weight": up, f"{peft(name)}.lora_A.weight": down}
            stored = {"unet.lora_alpha": alpha, "text_encoder.lora_alpha": alpha, "unet.use_dora": False}
            metadata = {"lora_adapter_metadata": json.dumps(stored)}
        else:
            layer = old(name) if "attn" in name else f"{peft(name)}.lora"
            tensors |= {f"{layer}.up.weight": up, f"{layer}.down.weight": down}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(("form", "alpha"), [("kohya", 1.5), ("peft", 6), ("old", RANK)])
def test_merged(model, tmp_path, form, alpha):
    """Every weight is as in a pipeline whose modules were changed in PyTorch; two LoRAs add up."""
    root = model[0]
    file = write(model, tmp_path / "a.safetensors", form, alpha)
    again = write(model, tmp_path / "b.safetensors", "kohya", RANK)
    ours = load(describe(root, "text"), loras=[lora.read(f"{file}:0.7"), lora.read(f"{again}:-0.2")])
    plain = load(describe(root, "text"))
    differences = {}
    for part in ("unet", "text_encoder"):
        new, before = (split(getattr(pipeline, part))[1] for pipeline in (ours, plain))
        differences |= {n: np.asarray(new[n] - x) for n, x in before.items() if (new[n] != x).any()}
    assert differences.keys() == set(PATHS)
    for i, (name, kernel) in enumerate(kernels(model).items()):
        expected = (0.7 * alpha / RANK - 0.2) * product(*halves(kernel, i)).numpy()
        result = next(differences[path] for path, layer in PATHS.items() if layer == name)
        expected = np.moveaxis(expected, (0, 1), (-1, -2)).reshape(result.shape)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_what_does_not_fit(model, tmp_path, capsys):
    root = model[0]
    up, down = torch.zeros(16, RANK), torch.zeros(RANK, 2048)

    def file(name, **tensors):
        save_file({n.replace("__", "."): x.clone() for n, x in tensors.items()}, tmp_path / name)
        return tmp_path / name

    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    wide = file("wide", **{f"{key}__lora_up__weight": up, f"{key}__lora_down__weight": down})
    xl = file("xl", lora_te2_text_model_x__lora_up__weight=up, lora_te2_text_model_x__lora_down__weight=down)
    rest = file("rest", **{f"{key}__lora_up__weight": up, f"{key}__lora_down__weight": down, "a__dora_scale": up})
    half = file("half", **{f"{key}__lora_up__weight": up})
    for path, message in (
        (wide, "attends to features of 2048 channels, as that of Stable Diffusion XL may): 1 of 1 layers have another"),
        (xl, "as it is a LoRA of Stable Diffusion XL: 1 of 1 layers are not in it: lora_te2_text_model_x"),
        (rest, "1 of 3 tensors do not belong to LoRA layers of up, down and alpha"),
        (rest, "a.dora_scale"),
        (half, "(only one of up and down)"),
        (f"{wide}:nan", "expected FILE or FILE:WEIGHT"),
        (tmp_path / "none", "none"),
    ):
        assert run("text", root, "--prompt", "a fox", "--out", tmp_path / "o.png", "--lora", path) == 2
        assert message in capsys.readouterr().err
    save_file({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, tmp_path / "dora",
              {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})  # fmt: skip
    with pytest.raises(LoraError, match=r"not supported: unet\.use_dora=True"):
        lora.read(str(tmp_path / "dora"))


def test_command(model, tmp_path):
    file = write(model, tmp_path / "a.safetensors", "kohya", 4)
    shared = ("--steps", 1, "--size", "32x32", "--dtype", "float32", "--batch", 1, "--out", tmp_path / "o.png")
    assert run("text", model[0], "--prompt", "a fox", *shared, "--lora", file, "--lora", f"{file}:0.5") == 0
