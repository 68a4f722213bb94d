"""The networks against diffusers' classes: float32, random weights, odd shapes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import SIZES, TINY, asymmetric, nchw, nhwc, numpy_state, perturb_norms, relative_error

from asymvq_jax.config import MeshConfig, ModelConfig
from asymvq_jax.convert.mapping import model_from_tensors
from asymvq_jax.devices import sharding
from asymvq_jax.models import blocks
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import merge, split
from asymvq_jax.models.posterior import Posterior

TOLERANCE = 1e-4


def _inputs(config: ModelConfig, height: int = 40, width: int = 72):
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    hard = (rng.uniform(size=(2, height, width, 1)) > 0.5).astype(np.float32)
    soft = rng.uniform(size=(2, height, width, 1)).astype(np.float32)
    z = rng.normal(size=(2, height // 8, width // 8, config.latent_channels)).astype(np.float32)
    return image, hard, soft, z


@pytest.mark.parametrize("size", SIZES)
def test_encode_and_decode_equal_diffusers(size):
    config = SIZES[size]
    theirs = asymmetric(config)
    ours = model_from_tensors(config, numpy_state(theirs), "diffusers")
    image, hard, soft, z = _inputs(config)
    with torch.no_grad():
        posterior = theirs.encode(nchw(image)).latent_dist
    mine = nnx.jit(lambda m, x: m.encode(x))(ours, image)
    assert relative_error(mine.mean, nhwc(posterior.mean)) <= TOLERANCE
    assert relative_error(mine.logvar, nhwc(posterior.logvar)) <= TOLERANCE

    decode = nnx.jit(lambda m, *arguments: m.decode(*arguments))
    full = np.ones_like(hard)
    for mask in (hard, soft, full, None):
        condition = {} if mask is None else {"image": nchw(image), "mask": nchw(mask)}
        with torch.no_grad():
            expected = nhwc(theirs.decode(nchw(z), **condition).sample)
        result = decode(ours, z, *(() if mask is None else (image, mask)))
        assert result.dtype == jnp.float32
        assert relative_error(result, expected) <= TOLERANCE


def test_plain_autoencoder_equals_diffusers():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = perturb_norms(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    ).eval()
    config = ModelConfig(
        encoder_channels=(32, 32, 64),
        decoder_channels=(32, 32, 64),
        latent_channels=16,
        quant_conv=False,
        condition=False,
    )
    ours = model_from_tensors(config, numpy_state(theirs), "diffusers")
    image = np.random.default_rng(0).uniform(-1, 1, (2, 20, 36, 3)).astype(np.float32)
    with torch.no_grad():
        z = theirs.encode(nchw(image)).latent_dist.mode()
        expected = nhwc(theirs.decode(z).sample)
    mine = ours.encode(jnp.asarray(image)).mode()
    assert relative_error(mine, nhwc(z)) <= TOLERANCE
    assert relative_error(ours.decode(mine), expected) <= TOLERANCE


def test_published_sizes():
    """Parameters of the encoder and the decoders, in millions, as published."""
    for widths, depth, decoder, branch in (
        ((128, 256, 512, 512), 2, 60.3, 10.8),
        ((192, 384, 768, 768), 3, 160.1, 24.3),
        ((256, 512, 1024, 1024), 5, 372.0, 43.1),
    ):
        _, shapes = structure(ModelConfig(decoder_channels=widths, decoder_blocks=depth))
        for prefix, expected in (("encoder.", 34.2), ("decoder.", decoder), ("decoder.condition.", branch)):
            count = sum(v.size for name, v in shapes.items() if name.startswith(prefix))
            assert round(count / 1e6, 1) == expected


def test_posterior_equals_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32) * 20
    theirs = DiagonalGaussianDistribution(nchw(moments))
    ours = Posterior.from_moments(jnp.asarray(moments))
    np.testing.assert_allclose(ours.kl(), theirs.kl().numpy(), rtol=1e-5)
    noise = jax.random.normal(jax.random.key(3), ours.mean.shape)
    expected = nhwc(theirs.mean) + nhwc(theirs.std) * np.asarray(noise)
    np.testing.assert_allclose(ours.sample(jax.random.key(3)), expected, rtol=1e-5, atol=1e-5)


def test_rematerialisation_changes_no_gradient():
    _, params = split(Autoencoder(TINY, rngs=nnx.Rngs(0)))
    image, mask, _, z = _inputs(TINY, 16, 24)

    def gradient(remat: bool):
        graphdef, _ = structure(dataclasses.replace(TINY, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(merge(graphdef, p).decode(z, image, mask)))))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_attention_in_chunks_equals_the_whole(monkeypatch):
    attention = blocks.Attention(32, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 32)), jnp.float32)
    results = []
    # 2 x 30 x 30 scores are 7,200 bytes: at once, in 3 chunks, and (29 has no divisor of 30 above it) one by one.
    for limit, chunks in ((7200, 1), (2400, 3), (256, 30)):
        monkeypatch.setattr(blocks, "SCORE_BYTES", limit)
        assert blocks._divisor_from(-(-7200 // limit), 30) == chunks
        results.append(nnx.jit(nnx.value_and_grad(lambda m, x: jnp.sum(jnp.square(m(x)))))(attention, x))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_attentions_chunks_are_counted_on_each_device(monkeypatch):
    attention = blocks.Attention(32, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.zeros((8, 6, 5, 32))
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * 30 * 30)
    assert "scan" in str(jax.make_jaxpr(attention)(x))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, fsdp=2))):
        assert "scan" not in str(jax.make_jaxpr(attention)(x))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    model = Autoencoder(TINY, rngs=nnx.Rngs(0))
    image, mask, _, z = _inputs(TINY, 16, 24)
    _, params = split(model)
    half = merge(structure(dataclasses.replace(TINY, dtype="bfloat16"))[0], params)
    assert half.decode_features(z, image, mask).dtype == jnp.bfloat16
    assert all(v.dtype == jnp.float32 for v in split(half)[1].values())
    assert relative_error(half.decode(z, image, mask), model.decode(z, image, mask)) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(jnp.zeros((1, 17, 16, 3))), "height and width multiples of 8"),
        (lambda m: m.encode(jnp.zeros((1, 3, 16, 16))), "channels last"),
        (lambda m: m.decode(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 16, 16, 3))), "image and mask together"),
        (
            lambda m: m.decode(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8, 8, 1))),
            "mask has shape (1, 8, 8, 1): expected (1, 16, 16, 1)",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Autoencoder(TINY, rngs=nnx.Rngs(0)))


def test_a_model_without_condition_refuses_a_mask():
    model = Autoencoder(dataclasses.replace(TINY, condition=False), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no condition branch"):
        model.decode(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 1)))
