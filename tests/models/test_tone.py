"""The field of tone: what it reads, and that it moves a fill towards what surrounds it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import TINY

from asymvq_jax import inference
from asymvq_jax.config import ConfigError, ModelConfig
from asymvq_jax.convert.mapping import weights
from asymvq_jax.errors import ConvertError
from asymvq_jax.inference.strips import decode_in_strips
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import merge, split
from asymvq_jax.models.tone import ToneField, enlarge, means, pool, push_pull


def _field(scale: float = 0.0) -> ToneField:
    """One as it begins, or with its last layers moved off zero."""
    graphdef, params = split(ToneField(3, rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(1), len(params))
    moved = {n: x + scale * jax.random.normal(k, x.shape) for (n, x), k in zip(params.items(), keys, strict=True)}
    return merge(graphdef, moved)


def _case(h: int = 56, w: int = 72):
    rng = np.random.default_rng(0)
    image = np.asarray(jax.image.resize(rng.uniform(-0.5, 0.5, (1, 4, 4, 3)), (1, h, w, 3), "cubic"), np.float32)
    mask = np.zeros((1, h, w, 1), np.float32)
    mask[:, 12:40, 20:52] = 1
    return image, mask


def test_a_new_field_undoes_most_of_an_offset():
    image, mask = _case()
    moved = image + mask * np.array([0.2, -0.1, 0.15], np.float32)
    result = np.asarray(_field()(moved, image, mask))
    before, after = (np.abs((x - image) * mask).sum() for x in (moved, result))
    assert after < 0.5 * before


def test_it_reads_no_pixel_of_the_original_under_the_mask_and_changes_none_outside():
    image, mask = _case()
    moved = image + 0.2 * mask
    result = np.asarray(_field(0.1)(moved, image, mask))
    np.testing.assert_array_equal(np.asarray(_field(0.1)(moved, np.where(mask > 0, 1.0, image), mask)), result)
    np.testing.assert_array_equal(np.where(mask > 0, 0, result), np.where(mask > 0, 0, moved))
    assert np.abs(result - moved).max() > 0.01


@pytest.mark.parametrize("size", [(8, 8), (33, 50), (1, 9)])
def test_any_size(size):
    image, mask = (x[:, : size[0], : size[1]] for x in _case())
    assert _field(0.1)(image, image, mask).shape == image.shape


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_without_an_edge_leaves_a_new_field_at_nothing(value):
    image, mask = _case()
    result = np.asarray(_field()(image, image, np.full_like(mask, value)))
    np.testing.assert_allclose(result, image, atol=1e-5)


def test_push_and_pull_spreads_a_constant_as_it_is():
    confidence = np.zeros((1, 13, 9, 1), np.float32)
    confidence[0, 2, 3] = confidence[0, 9, 7] = 1
    spread = push_pull(jnp.full((1, 13, 9, 2), 0.3) * confidence, jnp.asarray(confidence))
    np.testing.assert_allclose(spread, 0.3, atol=1e-3)


def test_means_and_enlargement_against_numpy():
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 2)).astype(np.float32)
    np.testing.assert_allclose(pool(x, 4)[0, 1, 2], x[0, 4:, 8:].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(enlarge(jnp.ones((1, 2, 3, 1)), 4, (7, 10)), np.ones((1, 7, 10, 1)), rtol=1e-6)
    image, mask = _case()
    found = means(image, image, mask, 1 - mask)
    inside = mask[0, 8:16, 20:24, 0] > 0
    np.testing.assert_allclose(found.inside[0, 3, 5], image[0, 12:16, 20:24].mean((0, 1)), rtol=1e-3, atol=1e-4)
    assert inside.sum() == 16
    assert float(found.share_inside[0, 2, 5, 0]) == 0


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    graphdef, params = split(Autoencoder(dataclasses.replace(TINY, tone_field=True), rngs=nnx.Rngs(0)))
    noise = {n: 0.1 * jax.random.normal(jax.random.key(2), x.shape) for n, x in params.items() if ".tone." in n}
    return merge(graphdef, {**params, **{n: params[n] + x for n, x in noise.items()}})


def test_a_decoder_with_a_field_adds_it_to_what_it_decodes(model):
    image, mask = _case()
    z = inference.encode(model, image)
    without = merge(split(Autoencoder(TINY, rngs=nnx.Rngs(0)))[0], {
        n: x for n, x in split(model)[1].items() if ".tone." not in n
    })  # fmt: skip
    plain = inference.decode(without, z, image, mask)
    np.testing.assert_allclose(
        inference.decode(model, z, image, mask), model.decoder.tone(plain, image, mask), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(inference.decode(model, z), inference.decode(without, z), atol=1e-6)


@pytest.mark.parametrize("margin", [0, 3])
def test_strips_give_the_same(model, margin):
    image, mask = _case(52, 68)
    z = inference.encode(model, image)
    whole = np.asarray(inference.decode(model, z, image, mask, margin=margin))
    strips = decode_in_strips(model, z, image, mask, strip_pixels=72 * 16, margin=margin)
    np.testing.assert_allclose(strips, whole, atol=1e-4 * np.abs(whole).max())


def test_keeping_exactly_pastes_up_to_the_edge_by_default(model):
    image, mask = _case()
    image = np.asarray(np.round((image[0] + 1) * 127.5), np.uint8)
    kept, pasted, feathered = (
        inference.inpaint(model, image, mask[0], keep="exact", blend=blend).image for blend in (None, "none", "feather")
    )
    np.testing.assert_array_equal(kept, pasted)
    assert (kept != feathered).any()


def test_there_is_no_place_for_it_in_other_formats():
    with pytest.raises(ConvertError, match="tone"):
        weights(dataclasses.replace(TINY, tone_field=True), "diffusers")


def test_it_needs_a_condition():
    with pytest.raises(ConfigError, match="tone_field"):
        ModelConfig(condition=False, tone_field=True)
