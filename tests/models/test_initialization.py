"""The beginning of small first stages: what the latent holds before the first step, and what is decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asymvq_jax.config import Config, ConfigError, LossConfig, ModelConfig, RunConfig
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.initialization import wavelet
from asymvq_jax.models.parameters import merge, seeded, split
from asymvq_jax.training.state import draw, init_state, make_blueprint

SMALL = ModelConfig(
    latent_channels=8,
    norm_groups=2,
    encoder_channels=(8, 16, 16, 32),
    decoder_channels=(16, 16, 32, 32),
    encoder_blocks=1,
    decoder_blocks=1,
    condition=False,
)


def _model(config=SMALL):
    params = jax.jit(lambda: split(Autoencoder(config, rngs=seeded(0)))[1])()
    return merge(structure(config)[0], wavelet(params, config, -6.0))


def _picture():
    """Soft blobs of colour, (1, 64, 64, 3)."""
    coarse = np.random.default_rng(0).uniform(-0.8, 0.8, (1, 4, 4, 3))
    return jax.image.resize(jnp.asarray(coarse, jnp.float32), (1, 64, 64, 3), "cubic").clip(-1, 1)


def _correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def test_latent_holds_luminance_colour_and_detail():
    picture = _picture()
    latent = jax.jit(lambda model, x: model.encode(x))(_model(), picture)
    means = np.asarray(picture).reshape(8, 8, 8, 8, 3).mean((1, 3))
    luminance = means @ np.array([0.299, 0.587, 0.114])
    z = np.asarray(latent.mode())[0]
    assert _correlation(z[..., 0], luminance) > 0.98
    assert _correlation(z[..., 1], means[..., 2] - luminance) > 0.98
    assert _correlation(z[..., 2], means[..., 0] - luminance) > 0.98
    # From left to right inside each 8 x 8: about the difference of the neighbours.
    assert _correlation(z[:, 1:-1, 3], luminance[:, :-2] - luminance[:, 2:]) > 0.9
    np.testing.assert_allclose(latent.logvar, -6.0, atol=1e-5)


def test_decoder_interpolates_the_colours():
    picture = _picture()
    decoded = np.asarray(jax.jit(lambda model, x: model.decode(model.encode(x).mode()))(_model(), picture))
    inside = (slice(None), slice(12, -12), slice(12, -12))
    for channel in range(3):
        assert _correlation(decoded[inside][..., channel], picture[inside][..., channel]) > 0.9


@pytest.mark.parametrize("changes", [{}, {"latent_channels": 4}, {"quant_conv": False}, {"encoder_blocks": 2}])
def test_shapes_stay(changes):
    config = ModelConfig(**{**{n: getattr(SMALL, n) for n in SMALL.__dataclass_fields__}, **changes})
    _, shapes = structure(config)
    params = jax.eval_shape(lambda: split(_model(config))[1])
    assert {n: (x.shape, x.dtype) for n, x in params.items()} == {n: (x.shape, x.dtype) for n, x in shapes.items()}


def test_a_run_begins_with_it():
    config = Config(
        run=RunConfig(train_encoder=True, initialization="wavelet", initial_log_variance=-3.0),
        model=SMALL,
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=8, discriminator_layers=1),
    )
    state = init_state(make_blueprint(config), draw(config))
    np.testing.assert_array_equal(state.params["quant_conv.bias"][8:], -3.0)
    assert not np.any(state.params["decoder.mid.block1.conv2.kernel"])


def test_only_for_first_stages_that_can_hold_it():
    with pytest.raises(ConfigError, match="initialization"):
        Config(run=RunConfig(init_from="x", initialization="wavelet"), model=SMALL)
    with pytest.raises(ConfigError, match="expected one of random, wavelet"):
        RunConfig(train_encoder=True, initialization="haar")
    narrow = ModelConfig(norm_groups=4, encoder_channels=(4, 8, 8, 8), decoder_channels=(8, 8, 8, 8))
    with pytest.raises(ConfigError, match="8 channels at every level"):
        Config(run=RunConfig(train_encoder=True, initialization="wavelet"), model=narrow)
