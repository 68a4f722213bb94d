"""The codebook: its nearest codes, gradients and losses against diffusers; its usage on one and on eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from flax import nnx
from oracles import nchw, nhwc

from asymvq_jax.config import MeshConfig
from asymvq_jax.devices import sharding
from asymvq_jax.models import codebook as codebooks
from asymvq_jax.models.codebook import Codebook, nearest_codes, usage


def _case(size: int, channels: int, seed: int = 0):
    """Latents and codes of the same spread, off the origin."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 1, (2, 5, 7, channels)).astype(np.float32)
    return jnp.asarray(z), jnp.asarray(rng.normal(0.5, 1, (size, channels)), jnp.float32)


def _codebook(embedding: jax.Array) -> Codebook:
    codebook = Codebook(*embedding.shape, rngs=nnx.Rngs(0))
    codebook.embedding[...] = embedding
    return codebook


@pytest.mark.parametrize(("size", "channels"), [(600, 3), (256, 4), (7, 16)])
def test_nearest_codes_equal_torch(size, channels):
    z, embedding = _case(size, channels)
    expected = torch.cdist(torch.from_numpy(np.array(z)), torch.from_numpy(np.array(embedding))[None]).argmin(-1)
    np.testing.assert_array_equal(jax.jit(nearest_codes)(z, embedding), expected.numpy())


@pytest.mark.parametrize("at_once", [3, 5, 20])
def test_of_equally_near_codes_the_first_is_taken(monkeypatch, at_once):
    monkeypatch.setattr(codebooks, "CODES_AT_ONCE", at_once)
    z, embedding = _case(10, 3)
    once = nearest_codes(z, embedding)
    assert len(np.unique(once)) == 8
    np.testing.assert_array_equal(nearest_codes(z, jnp.concatenate([embedding, embedding])), once)


def test_the_search_needs_no_distances_of_all_codes_and_rounds_nothing():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64, 64, 4), (16_384, 4))]
    program = str(jax.make_jaxpr(nearest_codes)(*shapes))
    assert "f32[2,64,64,256]" in program
    assert not re.search(r"2,64,64,\d{4}", program)
    assert "Precision.HIGHEST" in program


@pytest.mark.parametrize(("legacy", "codebook_weight", "commitment_weight"), [(True, 0.25, 1.0), (False, 1.0, 0.25)])
def test_quantisation_and_its_gradients_equal_diffusers(legacy, codebook_weight, commitment_weight):
    z, embedding = _case(40, 4)
    pull = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    theirs = VectorQuantizer(*embedding.shape, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data = torch.from_numpy(np.array(embedding))
    their_z = nchw(z).requires_grad_()
    quantized, loss, _ = theirs(their_z)
    (loss + (quantized * nchw(pull)).sum()).backward()

    def ours(codebook: Codebook, z: jax.Array) -> tuple[jax.Array, tuple]:
        latent = codebook(z)
        sample, penalties = latent.sample(jax.random.key(0)), latent.penalties()
        loss = codebook_weight * penalties["codebook"] + commitment_weight * penalties["commitment"]
        return loss + jnp.sum(sample * pull), (sample, loss, latent.mode())

    codebook = _codebook(embedding)
    (at_codebook, at_z), (sample, our_loss, mode) = nnx.grad(ours, argnums=(0, 1), has_aux=True)(codebook, z)
    np.testing.assert_allclose(sample, nhwc(quantized), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(our_loss, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(at_z, nhwc(their_z.grad), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at_codebook.embedding[...], theirs.embedding.weight.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mode, z)


def test_usage_of_a_batch_and_of_its_parts():
    codebook = _codebook(jnp.zeros((8, 2)))
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 6, (4, 3, 5)), jnp.int32)
    shares = codebook.shares(codes)
    counts = np.bincount(np.asarray(codes).ravel(), minlength=8) / codes.size
    np.testing.assert_allclose(shares, counts, rtol=1e-6)
    measured = usage(shares)
    entropy = -np.sum(counts[:6] * np.log(counts[:6]))
    np.testing.assert_allclose(measured["perplexity"], np.exp(entropy), rtol=1e-6)
    np.testing.assert_allclose(measured["codes_used"], 6 / 8)
    parts = jnp.mean(jnp.stack([codebook.shares(part) for part in codes]), 0)
    np.testing.assert_allclose(parts, shares, rtol=1e-6)
    np.testing.assert_allclose(usage(codebook.shares(jnp.full((1, 2, 2), 3)))["perplexity"], 1.0)


@pytest.mark.parametrize("rows", [False, True])
def test_eight_devices_choose_and_count_the_same_codes(rows):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 16, 3, 4)).astype(np.float32)
    codebook = _codebook(jnp.asarray(rng.normal(size=(30, 4)), jnp.float32))

    def work(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent = codebook(z)
        return latent.codes, codebook.shares(latent.codes)

    mesh = sharding.make_height_mesh() if rows else sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    place = sharding.height_sharding(mesh) if rows else sharding.batch_sharding(mesh)
    expected = work(jnp.asarray(z))
    with jax.set_mesh(mesh):
        codes, shares = jax.jit(work)(jax.device_put(z, place))
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_allclose(shares, expected[1], rtol=1e-6)
