"""Pictures larger than one device's memory: in strips of rows on one device, and height-sharded over several."""

import numpy as np
import pytest
from flax import nnx
from oracles import TINY, relative_error

from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.strips import decode_in_strips


@pytest.fixture(scope="module")
def model():
    return Autoencoder(TINY, rngs=nnx.Rngs(0))


def _inputs(height: int, width: int):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, height // 8, width // 8, 4)).astype(np.float32)
    # The picture's contrast differs from top to bottom, so that a strip's own statistics would be wrong ones.
    image = rng.uniform(-1, 1, (2, height, width, 3)) * np.linspace(0.1, 1, height)[None, :, None, None]
    mask = rng.uniform(size=(2, height, width, 1)) > 0.5
    return z, image.astype(np.float32), mask.astype(np.float32)


@pytest.mark.parametrize("condition", [True, False])
def test_strips_equal_the_whole(model, condition):
    z, image, mask = _inputs(40, 24)
    given = (z, image, mask) if condition else (z,)
    # Strips of 6 rows at full resolution (the last one of 4), and of 2 where the minimum holds.
    result = decode_in_strips(model, *given, strip_pixels=6 * 24)
    assert result.dtype == np.float32
    assert relative_error(result, nnx.jit(lambda m, *a: m.decode(*a))(model, *given)) <= 1e-5
