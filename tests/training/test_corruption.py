"""The corruption of fills: where it reaches, how often, and that a step trains on it deterministically."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.filters import gaussian

from asymvq_jax.config import Config, DataConfig, HarmoniseConfig, LossConfig, ModelConfig, RunConfig
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConfigError
from asymvq_jax.losses.reconstruction import reconstruction_loss
from asymvq_jax.training import corruption
from asymvq_jax.training.corruption import halo
from asymvq_jax.training.state import create_state, make_blueprint
from asymvq_jax.training.step import train_step

ALWAYS = HarmoniseConfig(probability=1.0)
corrupt = jax.jit(corruption.corrupt, static_argnums=3)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = rng.uniform(-0.6, 0.6, (16, 24, 32, 3)).astype(np.float32)
    mask = np.zeros((16, 24, 32, 1), np.float32)
    mask[:, 8:18, 10:24] = 1
    return jnp.asarray(image), jnp.asarray(mask)


def test_only_the_masked_region_and_its_edge_change(batch):
    image, mask = batch
    moved = np.abs(np.asarray(corrupt(image, mask, jax.random.key(1), ALWAYS) - image))
    assert (moved[:, 10:16, 12:22].mean((1, 2, 3)) > 0.01).all()
    # The region grows by up to 2 px, and a soft edge reaches 6 px farther.
    assert (moved[:, :, 0:2] == 0).all()
    hard = dataclasses.replace(ALWAYS, edge=0)
    outside = np.abs(np.asarray(corrupt(image, mask, jax.random.key(1), hard) - image))[:, 16:, 30:]
    assert (outside == 0).all()


def test_the_share_of_corrupted_samples_is_the_probability(batch):
    image, mask = batch
    config = HarmoniseConfig(probability=0.25)
    changed = [
        np.asarray(corrupt(image, mask, jax.random.key(seed), config) != image).any((1, 2, 3)) for seed in range(20)
    ]
    assert 0.17 < np.mean(changed) < 0.33


def test_a_full_mask_stays_as_it_is(batch):
    image, mask = batch
    np.testing.assert_array_equal(corrupt(image, jnp.ones_like(mask), jax.random.key(1), ALWAYS), image)


def test_a_sample_depends_on_key_and_place_alone(batch):
    image, mask = batch
    whole = corrupt(image, mask, jax.random.key(3), ALWAYS)
    np.testing.assert_array_equal(whole[:4], corrupt(image[:4], mask[:4], jax.random.key(3), ALWAYS))
    assert (np.asarray(whole) != np.asarray(corrupt(image, mask, jax.random.key(4), ALWAYS))).any((1, 2, 3)).all()


def test_tones_move_by_no_more_than_the_configuration_says(batch):
    image, mask = batch
    config = HarmoniseConfig(probability=1.0, offset=0.1, gradient=0.0, gain=0.0, blur=0.0, noise=0.0, edge=0)
    for seed in range(4):
        moved = np.asarray(corrupt(image, mask, jax.random.key(seed), config) - image)[:, 14, 17]
        assert np.abs(moved).max() <= 0.15 + 1e-6
    assert np.abs(moved).max() > 0.05


insert = jax.jit(corruption.insert, static_argnums=3)


def test_an_insertion_is_the_next_pictures_content_up_to_the_edge_or_inside_it(batch):
    image, mask = (np.asarray(x) for x in batch)
    flush = np.asarray(insert(image, mask, jax.random.key(1), HarmoniseConfig(insert_flush=1.0)))
    np.testing.assert_allclose(flush, np.where(mask > 0, np.roll(image, -1, axis=0), image), atol=1e-6)
    inside = np.abs(np.asarray(insert(image, mask, jax.random.key(1), HarmoniseConfig(insert=1.0))) - image)
    assert inside[:, 10:16, 12:22].max() > 0.1
    ring = mask.copy()
    ring[:, 10:16, 12:22] = 0
    assert (inside * ring).max() < 1e-6


def test_nothing_is_inserted_under_a_full_mask_or_without_probability(batch):
    image, mask = batch
    always = HarmoniseConfig(insert_flush=1.0)
    np.testing.assert_array_equal(insert(image, jnp.ones_like(mask), jax.random.key(1), always), image)
    np.testing.assert_array_equal(insert(image, mask, jax.random.key(1), HarmoniseConfig()), image)


def test_the_halo_is_a_band_on_both_sides_of_the_edge():
    mask = jnp.zeros((1, 20, 20, 1)).at[:, :, 10:].set(1)
    band = np.asarray(halo(mask, 3))[0, :, :, 0]
    np.testing.assert_array_equal(band[5], [0] * 7 + [1] * 6 + [0] * 7)


def test_blur_is_a_gaussian():
    image = np.random.default_rng(0).uniform(-1, 1, (17, 23, 3)).astype(np.float32)
    blurred = jax.jit(corruption.blur)(jnp.asarray(image), 1.2)
    expected = gaussian(image, 1.2, mode="nearest", truncate=5, channel_axis=-1)
    np.testing.assert_allclose(blurred, expected, atol=2e-6)


def test_losses_on_the_composite_and_the_halo():
    rng = np.random.default_rng(0)
    image, target = (jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32) for _ in range(2))
    emphasis = jnp.ones((2, 8, 8, 1)).at[:, :4].set(3.0)
    loss, parts = reconstruction_loss(image, target, None, 0.0, "mean", emphasis=emphasis)
    error = np.abs(np.asarray(image - target))
    np.testing.assert_allclose(loss, (3 * error[:, :4]).mean() / 2 + error[:, 4:].mean() / 2, rtol=1e-6)
    np.testing.assert_allclose(parts["l1"], error.mean(), rtol=1e-6)


def test_training_the_field_of_tone_leaves_the_decoder_alone(batch):
    image, mask = (np.asarray(x)[:2] for x in batch)
    pixels = {"image": np.round((image + 1) * 127.5).astype(np.uint8), "mask": mask.astype(np.uint8)}
    config = Config(
        run=RunConfig(init_from="somewhere", train_tone=True),
        model=ModelConfig(
            latent_channels=2, norm_groups=2, encoder_channels=(4, 4), decoder_channels=(4, 4), encoder_blocks=1,
            decoder_blocks=1, mid_attention=False, tone_field=True,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        data=DataConfig(batch_size=2, image_size=24),
        harmonise=HarmoniseConfig(probability=1.0, insert=0.5),
    )  # fmt: skip
    blueprint = make_blueprint(config)
    state = create_state(blueprint, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    assert all(name.startswith("decoder.tone.") for name in state.params)
    with jax.numpy_dtype_promotion("standard"):
        after, metrics = jax.jit(partial(train_step, blueprint=blueprint, adversarial=False))(state, {}, pixels)
    assert any((np.asarray(after.params[n]) != np.asarray(x)).any() for n, x in state.params.items())
    assert float(metrics["l1"]) > 0


def test_the_field_of_tone_is_trained_alone_only_where_there_is_one():
    with pytest.raises(ConfigError, match=r"run\.train_tone"):
        Config(run=RunConfig(init_from="somewhere", train_tone=True), loss=LossConfig(gan_start=-1))


def test_a_step_encodes_the_corrupted_picture_and_aims_at_the_clean_one(batch, monkeypatch):
    image, mask = (np.asarray(x)[:2] for x in batch)
    pixels = {"image": np.round((image + 1) * 127.5).astype(np.uint8), "mask": mask.astype(np.uint8)}
    model = ModelConfig(
        latent_channels=2, norm_groups=2, encoder_channels=(4, 4), decoder_channels=(4, 4), encoder_blocks=1,
        decoder_blocks=1, mid_attention=False,
    )  # fmt: skip
    config = Config(
        run=RunConfig(init_from="somewhere"),
        model=model,
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        data=DataConfig(batch_size=2, image_size=24),
    )
    blueprint = make_blueprint(config)
    state = create_state(blueprint, sharding.make_mesh(config.mesh, jax.devices()[:1]))

    def losses(harmonise: HarmoniseConfig) -> float:
        changed = dataclasses.replace(blueprint, config=dataclasses.replace(config, harmonise=harmonise))
        step = jax.jit(partial(train_step, blueprint=changed, adversarial=False))
        # optax's Adam relies on promotion.
        with jax.numpy_dtype_promotion("standard"):
            return float(step(state, {}, pixels)[1]["l1"])

    plain = losses(HarmoniseConfig())
    # Grey pictures: what is encoded changes, the target does not.
    monkeypatch.setattr("asymvq_jax.training.step.corrupt", lambda image, *_: 0 * image)
    grey = losses(ALWAYS)
    pixels["image"] = np.full_like(pixels["image"], 127)
    assert grey != plain
    assert abs(grey - losses(HarmoniseConfig())) > 0.05
