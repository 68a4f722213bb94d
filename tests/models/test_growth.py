"""A grown decoder computes what the narrow one does, and its copied channels part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import relative_error

from asymvq_jax.config import Config, ModelConfig, RunConfig
from asymvq_jax.errors import ConfigError
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.growth import grow_decoder
from asymvq_jax.models.parameters import merge, split
from asymvq_jax.training.state import starting_parameters

# As Stable Diffusion's decoder: four channels a group and two blocks a level, at an eighth of the width.
NARROW = ModelConfig(
    encoder_channels=(16, 32, 64, 64), decoder_channels=(16, 32, 64, 64), norm_groups=4, condition=False
)
X2 = dataclasses.replace(NARROW, decoder_channels=(32, 64, 128, 128), decoder_blocks=5)
X1_5 = dataclasses.replace(NARROW, decoder_channels=(24, 48, 96, 96), decoder_blocks=3)


def _random(config: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """A model whose norms are moved off their initial 1 and 0."""
    graphdef, params = split(Autoencoder(config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    moved = {n: x + jnp.asarray(rng.uniform(-0.5, 0.5, x.shape), x.dtype) for n, x in params.items() if ".norm" in n}
    return graphdef, {**params, **moved}


def _grown(narrow: ModelConfig, wide: ModelConfig):
    """The narrow model and the wide one that has grown from it."""
    graphdef, params = _random(narrow)
    wide_graphdef, wide_params = _random(wide, seed=1)
    grown = grow_decoder(narrow, params, wide, seed=2)
    for name, value in grown.items():
        assert value.shape == wide_params[name].shape
        assert value.dtype == np.float32
    return merge(graphdef, params), wide_graphdef, {**wide_params, **params_of_encoder(params), **grown}


def params_of_encoder(params):
    return {n: x for n, x in params.items() if not n.startswith("decoder.")}


def _latent():
    return jax.random.normal(jax.random.key(3), (2, 5, 3, 4))


def test_x2_computes_the_same():
    narrow, graphdef, params = _grown(NARROW, X2)
    z = _latent()
    assert relative_error(merge(graphdef, params).decode(z), narrow.decode(z)) <= 1e-4


def test_x2_with_a_condition_branch_is_the_same_without_picture_and_with_a_full_mask():
    narrow, graphdef, params = _grown(NARROW, dataclasses.replace(X2, condition=True))
    wide, z = merge(graphdef, params), _latent()
    image = jax.random.uniform(jax.random.key(4), (2, 40, 24, 3), minval=-1)
    assert relative_error(wide.decode(z), narrow.decode(z)) <= 1e-4
    assert relative_error(wide.decode(z, image, jnp.ones((2, 40, 24, 1))), narrow.decode(z)) <= 1e-4


def test_a_condition_branch_grows_too():
    narrow, graphdef, params = _grown(
        dataclasses.replace(NARROW, condition=True), dataclasses.replace(X2, condition=True)
    )
    z = _latent()
    image = jax.random.uniform(jax.random.key(4), (2, 40, 24, 3), minval=-1)
    mask = (jax.random.uniform(jax.random.key(5), (2, 40, 24, 1)) > 0.5).astype(jnp.float32)
    assert relative_error(merge(graphdef, params).decode(z, image, mask), narrow.decode(z, image, mask)) <= 1e-4


def test_attention_in_levels_grows_too():
    narrow = dataclasses.replace(NARROW, decoder_blocks=1, attention_levels=(3,))
    narrow, graphdef, params = _grown(narrow, dataclasses.replace(X2, decoder_blocks=2, attention_levels=(3,)))
    assert relative_error(merge(graphdef, params).decode(_latent()), narrow.decode(_latent())) <= 1e-4


def test_x1_5_is_near():
    narrow, graphdef, params = _grown(NARROW, X1_5)
    z = _latent()
    ours, theirs = np.asarray(merge(graphdef, params).decode(z)), np.asarray(narrow.decode(z))
    share = np.square(ours - theirs).mean() / theirs.var()
    assert 1e-6 < share < 0.5
    random = np.asarray(merge(graphdef, _random(X1_5, seed=1)[1]).decode(z))
    assert np.square(random - theirs).mean() / theirs.var() > 0.8


def test_copies_part():
    _, graphdef, params = _grown(NARROW, X2)
    z, target = _latent(), jax.random.normal(jax.random.key(6), (2, 40, 24, 3))

    def loss(params):
        return jnp.mean(jnp.square(merge(graphdef, params).decode(z) - target))

    gradients = jax.grad(loss)(params)
    for name in (
        "decoder.conv_in.kernel",
        "decoder.levels.1.blocks.0.conv2.kernel",
        "decoder.levels.3.blocks.0.norm2.scale",
    ):
        # Copies lie side by side.
        value, gradient = np.asarray(params[name]), np.asarray(gradients[name])
        apart = np.abs(gradient[..., ::2] - gradient[..., 1::2]).max() / np.abs(gradient).max()
        assert apart > 1e-3, name
        if name == "decoder.conv_in.kernel":
            np.testing.assert_array_equal(value[..., ::2], value[..., 1::2])


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_channels": (16, 32, 32, 64)},
        {"decoder_channels": (16, 32, 64, 128)},
        {"decoder_blocks": 1},
        {"norm_groups": 2},
    ],
)
def test_what_cannot_grow_is_refused(changes):
    with pytest.raises(ConfigError, match=r"a decoder with model.decoder_channels=\(16, 32, 64, 64\)"):
        grow_decoder(NARROW, _random(NARROW)[1], dataclasses.replace(NARROW, **changes), seed=0)


def test_a_run_starts_from_the_grown_decoder():
    run = RunConfig(init_from="somewhere", grow_decoder=True)
    _, params = _random(NARROW)
    taken = starting_parameters(Config(run=run, model=dataclasses.replace(X2, condition=True)), NARROW, params)
    grown = grow_decoder(NARROW, params, X2, run.seed)
    assert set(taken) == {*params_of_encoder(params), *grown}
    for name, value in grown.items():
        np.testing.assert_array_equal(taken[name], value)
    plain = starting_parameters(Config(run=dataclasses.replace(run, grow_decoder=False), model=X2), NARROW, params)
    assert set(plain) == set(params_of_encoder(params))
