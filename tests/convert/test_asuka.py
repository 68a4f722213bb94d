"""ASUKA's decoder: parity with its published layout, its file both ways, and what it makes of thin masks."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import relative_error
from test_sources import random_model
from torch import nn
from torch.nn import functional

from asymvq_jax import inference
from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import convert, read_model
from asymvq_jax.convert.mapping import dump_tensors
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConfigError, ConvertError
from asymvq_jax.inference.strips import decode_in_strips
from asymvq_jax.models.decoder import level_masks
from asymvq_jax.models.parameters import split

CHANNELS = (32, 64, 64)
CONFIG = ModelConfig(
    encoder_channels=(32, 32, 32),
    decoder_channels=CHANNELS,
    encoder_blocks=1,
    decoder_blocks=1,
    latent_channels=16,
    quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    condition_mask=True,
    mask_reduction="area-any",
)
FACTORS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs, eps=1e-6), nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        flat = [layer(self.norm(x)).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return x + self.proj_out(functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(x.shape))


class Asuka(nn.Module):
    """The decoder as ASUKA's authors publish it, by the names of its file."""

    def __init__(self):
        super().__init__()
        last = CHANNELS[-1]
        self.conv_in = nn.Conv2d(CONFIG.latent_channels, last, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": Block(last, last), "attn_1": Attention(last), "block_2": Block(last, last)}
        )
        self.up = nn.ModuleList()
        for level, width in enumerate(CHANNELS):
            inputs = CHANNELS[min(level + 1, len(CHANNELS) - 1)]
            up = nn.ModuleDict({"block": nn.ModuleList([Block(inputs, width), Block(width, width)])})
            if level:
                up["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            self.up.append(up)
        convs = [nn.Conv2d(4, CHANNELS[0], 3, padding=1), nn.Conv2d(CHANNELS[0], CHANNELS[1], 3, padding=1)]
        convs += [nn.Conv2d(a, b, 4, 2, 1) for a, b in ((CHANNELS[1], CHANNELS[2]), (CHANNELS[2], last))]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(convs)})
        self.norm_out = nn.GroupNorm(32, CHANNELS[0], eps=1e-6)
        self.conv_out = nn.Conv2d(CHANNELS[0], 3, 3, padding=1)

    def forward(self, z, image, mask):
        seen, x = {}, torch.cat([(1 - mask) * image, mask], 1)
        for layer in self.encoder["layers"]:
            x = layer(x)
            # A later feature of a shape takes the place of an earlier one.
            seen[tuple(x.shape)] = x
            x = functional.relu(x)
        h = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](self.conv_in(z))))
        for level in reversed(range(len(CHANNELS))):
            small = (functional.interpolate(mask, size=h.shape[-2:], mode="area") > 0).float()
            h = h * small + seen[tuple(h.shape)] * (1 - small)
            for block in self.up[level]["block"]:
                h = block(h)
            if level:
                h = self.up[level]["upsample"]["conv"](functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = h * mask + seen[tuple(h.shape)] * (1 - mask)
        return self.conv_out(functional.silu(self.norm_out(h)))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def inputs():
    """A latent, a picture, and a mask with a block, lines of one pixel that nearest reduction loses, and a grey."""
    rng = np.random.default_rng(1)
    mask = np.zeros((2, 24, 32, 1), np.float32)
    mask[0, 4:12, 8:20] = 1
    mask[1, 13] = mask[1, :, 19] = 1
    mask[1, 3, 5] = 0.4
    image = rng.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    return rng.normal(size=(2, 6, 8, 16)).astype(np.float32), image, mask


def test_it_decodes_as_the_published_code(model, inputs):
    theirs = Asuka()
    tensors = {n.removeprefix("decoder."): x for n, x in dump_tensors(model, "ldm").items() if n.startswith("decoder.")}
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=True)
    with torch.no_grad():
        expected = theirs(*(torch.from_numpy(x).movedim(-1, 1) for x in inputs)).movedim(1, -1).numpy()
    z, image, mask = inputs
    whole = inference.decode(model, z, image, mask)
    assert relative_error(whole, expected) <= 1e-5
    assert relative_error(decode_in_strips(model, z, image, mask, strip_pixels=8 * 32), expected) <= 1e-5
    mesh = sharding.make_height_mesh(jax.devices()[:2])
    assert relative_error(inference.decode(model, z, image, mask, mesh=mesh), expected) <= 1e-5


def test_its_file_is_read_and_written(model, tmp_path, caplog):
    tensors = {name: torch.tensor(x) for name, x in dump_tensors(model, "ldm").items()}
    unused = {"decoder.up_layers.0.deconv.weight": torch.zeros(4, 2, 4, 4), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": tensors | unused, "epoch": 3}, tmp_path / "asuka_decoder.ckpt")
    with caplog.at_level(logging.INFO):
        ours = read_model(tmp_path / "asuka_decoder.ckpt", FACTORS)
    assert ours.config == CONFIG
    convert(tmp_path / "asuka_decoder.ckpt", tmp_path / "ours", **FACTORS)
    for number, file in enumerate(("again.safetensors", "again.ckpt")):
        convert(tmp_path / "ours", tmp_path / file, "ldm")
        again = read_model(tmp_path / file)
        assert again.config == CONFIG
        for name, value in split(model)[1].items():
            np.testing.assert_array_equal(split(again)[1][name], value, err_msg=f"{number} {name}")
    with pytest.raises(
        ConvertError, match=r"cannot hold .*model.condition_mask=True and model.mask_reduction=area-any"
    ):
        convert(tmp_path / "ours", tmp_path / "diffusers", "diffusers")
    alone = {name: x for name, x in tensors.items() if name.startswith("decoder.")}
    torch.save({"state_dict": alone}, tmp_path / "alone.ckpt")
    with pytest.raises(ConvertError, match="only its decoder is there"):
        read_model(tmp_path / "alone.ckpt", FACTORS)


def test_nothing_of_a_mask_is_lost(inputs):
    mask = inputs[2]
    for count in (2, 3, 4):
        nearest, whole = (level_masks(mask, count, reduction) for reduction in ("nearest", "area-any"))
        assert [m.shape for m in nearest] == [m.shape for m in whole]
        np.testing.assert_array_equal(nearest[0], mask)
        np.testing.assert_array_equal(whole[0], mask)
        for small in whole[1:]:
            factor = 24 // small.shape[1]
            expected = functional.interpolate(torch.from_numpy(mask).movedim(-1, 1), small.shape[1:3], mode="area") > 0
            np.testing.assert_array_equal(small[..., 0], expected[:, 0].numpy(), err_msg=str(factor))
    # The line between the rows that nearest takes.
    assert not nearest[-1][1, 3].any()
    assert whole[-1][1, 3].all()
    np.testing.assert_array_equal(level_masks(jnp.asarray(mask), 4, "area-any")[-1], whole[-1])


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="nearest, area-any"):
        ModelConfig(mask_reduction="mean")
    with pytest.raises(ConfigError, match=r"model\.condition_mask"):
        ModelConfig(condition=False, condition_mask=True)
