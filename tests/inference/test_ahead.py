"""Programs that are compiled while weights are read: the same pictures, and no compilation afterwards."""

import numpy as np
import pytest
from flax import nnx
from oracles import TINY

from asymvq_jax import inference
from asymvq_jax.convert.convert import read_model
from asymvq_jax.inference.ahead import compile_ahead
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model

SIZE = (17, 24)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return Autoencoder(TINY, rngs=nnx.Rngs(0))


def test_what_is_compiled_ahead_gives_the_same_pictures(model):
    rng = np.random.default_rng(0)
    image, mask = rng.uniform(-1, 1, (1, *SIZE, 3)).astype(np.float32), np.ones((1, *SIZE, 1), np.float32)
    mask[:, 4:9] = 0
    z = inference.encode(model, image)
    expected = inference.decode(model, z, image, mask)
    two = [np.concatenate([x, x]) for x in (z, image, mask)]
    both = inference.decode(model, *two)
    ahead = compile_ahead(TINY, SIZE, encodes=True)
    np.testing.assert_array_equal(ahead["encode"](model, image), z)
    np.testing.assert_array_equal(ahead["decode"](model, z, image, mask), expected)
    # Other shapes than those that were compiled are compiled when they come.
    np.testing.assert_array_equal(ahead["decode"](model, *two), both)
    assert set(compile_ahead(TINY, SIZE, encodes=False)) == {"decode"}


def test_the_configuration_is_known_before_the_weights(model, tmp_path):
    """Of every kind of source, in the compute type that was asked for."""
    save_model(tmp_path / "ours", model)
    for source in (tmp_path / "ours", "tiny"):
        seen = []
        read = read_model(source, dtype="bfloat16", known=seen.append)
        assert [config.dtype for config in seen] == ["bfloat16"]
        assert seen == [read.config]
