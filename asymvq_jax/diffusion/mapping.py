"""The tables of weight names of Stable Diffusion's parts: ours, diffusers' and transformers', the original."""

from __future__ import annotations

from collections.abc import Sequence

from asymvq_jax.convert.mapping import Row, Weight, name_parameters
from asymvq_jax.diffusion.clip import ImageEncoder, TextEncoder
from asymvq_jax.diffusion.unet import UNet
from asymvq_jax.files.stored import Table
from asymvq_jax.models.parameters import split


def _layers(prefixes: Sequence[str], *names: tuple[str, str, str]) -> list[Row]:
    return [Row(*(f"{p}.{n}" for p, n in zip(prefixes, row, strict=True))) for row in names]


# diffusers' names of an attention's layers.
ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))


def _timed(*prefixes: str) -> list[Row]:
    return _layers(
        prefixes,
        ("norm1", "norm1", "in_layers.0"),
        ("conv1", "conv1", "in_layers.2"),
        ("time", "time_emb_proj", "emb_layers.1"),
        ("norm2", "norm2", "out_layers.0"),
        ("conv2", "conv2", "out_layers.3"),
        ("shortcut", "conv_shortcut", "skip_connection"),
    )


def _transformer(*prefixes: str) -> list[Row]:
    def same(ours: str, theirs: str) -> tuple[str, str, str]:
        return ours, theirs, theirs

    block, inside = "blocks.{k}", "transformer_blocks.{k}"
    attentions = [
        same(f"{block}.{ours}_attention.{name}", f"{inside}.{theirs}.{their}")
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for name, their in ATTENTION
    ]
    return _layers(
        prefixes,
        same("norm", "norm"),
        same("proj_in", "proj_in"),
        *(same(f"{block}.norm{i}", f"{inside}.norm{i}") for i in (1, 2, 3)),
        *attentions,
        same(f"{block}.feed_forward.expand", f"{inside}.ff.net.0.proj"),
        same(f"{block}.feed_forward.contract", f"{inside}.ff.net.2"),
        same("proj_out", "proj_out"),
    )


# The original numbers its blocks through: {in}, {halving}, {out} and {doubling}, of which the last is the {third} or
# second part of its block.
UNET: list[Row] = [
    Row("time1", "time_embedding.linear_1", "time_embed.0"),
    Row("time2", "time_embedding.linear_2", "time_embed.2"),
    Row("added1", "add_embedding.linear_1", "label_emb.0.0"),
    Row("added2", "add_embedding.linear_2", "label_emb.0.2"),
    Row("conv_in", "conv_in", "input_blocks.0.0"),
    *_timed("down.{i}.blocks.{j}", "down_blocks.{i}.resnets.{j}", "input_blocks.{in}.0"),
    *_transformer("down.{i}.attentions.{j}", "down_blocks.{i}.attentions.{j}", "input_blocks.{in}.1"),
    Row("down.{i}.downsample", "down_blocks.{i}.downsamplers.0.conv", "input_blocks.{halving}.0.op"),
    *_timed("mid_block1", "mid_block.resnets.0", "middle_block.0"),
    *_transformer("mid_attention", "mid_block.attentions.0", "middle_block.1"),
    *_timed("mid_block2", "mid_block.resnets.1", "middle_block.2"),
    *_timed("up.{i}.blocks.{j}", "up_blocks.{i}.resnets.{j}", "output_blocks.{out}.0"),
    *_transformer("up.{i}.attentions.{j}", "up_blocks.{i}.attentions.{j}", "output_blocks.{out}.1"),
    Row("up.{i}.upsample", "up_blocks.{i}.upsamplers.0.conv", "output_blocks.{doubling}.{third}.conv"),
    Row("norm_out", "conv_norm_out", "out.0"),
    Row("conv_out", "conv_out", "out.2"),
]


def _clip_block(ours: str, theirs: str, ldm: str) -> list[Row]:
    return _layers(
        (ours, theirs, ldm),
        ("norm1", "layer_norm1", "ln_1"),
        # The original has query, key and value in one (`split_joint`).
        ("attention.query", "self_attn.q_proj", "attn.q_proj"),
        ("attention.key", "self_attn.k_proj", "attn.k_proj"),
        ("attention.value", "self_attn.v_proj", "attn.v_proj"),
        ("attention.out", "self_attn.out_proj", "attn.out_proj"),
        ("norm2", "layer_norm2", "ln_2"),
        ("feed_forward.expand", "mlp.fc1", "mlp.c_fc"),
        ("feed_forward.contract", "mlp.fc2", "mlp.c_proj"),
    )


# The third column is OpenCLIP's, in Stable Diffusion 2's checkpoints; those of 1 have transformers' names.
TEXT: list[Row] = [
    Row("tokens", "embeddings.token_embedding", "token_embedding"),
    Row("positions.embedding", "embeddings.position_embedding.weight", "positional_embedding"),
    *_clip_block("blocks.{i}", "encoder.layers.{i}", "transformer.resblocks.{i}"),
    Row("norm_out", "final_layer_norm", "ln_final"),
    Row("projection", "text_projection", "text_projection"),
]


def _mapper_block(ours: str, theirs: str) -> list[Row]:
    names = [
        ("norm1", "norm1"),
        *((f"attention.{n}", f"attn1.{t}") for n, t in ATTENTION),
        ("norm2", "norm3"),
        ("feed_forward.expand", "ff.net.0.proj"),
        ("feed_forward.contract", "ff.net.2"),
    ]  # fmt: skip
    # Paint-by-Example's original checkpoint is not read.
    return [Row(f"{ours}.{n}", f"{theirs}.{t}", "") for n, t in names]


IMAGE: list[Row] = [
    Row("patches", "model.embeddings.patch_embedding", ""),
    Row("class_token", "model.embeddings.class_embedding", ""),
    Row("positions", "model.embeddings.position_embedding", ""),
    # The misspelling is transformers'.
    Row("norm_in", "model.pre_layrnorm", ""),
    *_clip_block("blocks.{i}", "model.encoder.layers.{i}", ""),
    Row("norm_pooled", "model.post_layernorm", ""),
    *_mapper_block("mapper.{i}", "mapper.blocks.{i}"),
    Row("norm_out", "final_layer_norm", ""),
    Row("proj_out", "proj_out", ""),
    Row("unconditional", "uncond_vector", ""),
]


def unet_weights(model: UNet, form: str) -> list[Weight]:
    """The parameters of a UNet with their names in `form`, "diffusers" or "ldm"."""
    config, per_level = model.config, model.config.blocks + 1

    def derive(indices: dict[str, int]) -> dict[str, int]:
        i, j = indices.get("i", 0), indices.get("j", 0)
        # Up levels count from the innermost.
        attends = config.attention[len(config.channels) - 1 - i] if i < len(config.channels) else False
        return {
            "in": 1 + i * per_level + j,
            "halving": (i + 1) * per_level,
            "out": i * per_level + j,
            "doubling": (i + 1) * per_level - 1,
            "third": 2 if attends else 1,
        }

    return name_parameters(split(model)[1], UNET, form, derive)


def text_weights(model: TextEncoder, form: str) -> list[Weight]:
    """The parameters of a text encoder with transformers' names ("diffusers") or OpenCLIP's ("ldm")."""
    return name_parameters(split(model)[1], TEXT, form)


def image_weights(model: ImageEncoder) -> list[Weight]:
    """The parameters of an image encoder with diffusers' names."""
    return name_parameters(split(model)[1], IMAGE, "diffusers")


def split_joint(tensors: Table) -> Table:
    """OpenCLIP's joint projections to query, key and value, each by itself."""
    result: Table = {}
    for name, tensor in tensors.items():
        prefix, joint, kind = name.rpartition("attn.in_proj_")
        if joint and tensor.ndim:
            parts = ("q_proj", "k_proj", "v_proj")
            result |= {f"{prefix}attn.{part}.{kind}": tensor.part(i, 3) for i, part in enumerate(parts)}
        else:
            result[name] = tensor
    return result
