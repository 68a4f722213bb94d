"""Parameters as dictionaries of arrays: the number that tells whether they are those that were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asymvq_jax.devices import sharding
from asymvq_jax.models.parameters import fingerprint


def test_the_fingerprint_is_the_same_on_the_host_and_on_devices():
    """Of every type and rank; NumPy computes the one, XLA the other. The number is that of release 0.1."""
    rng = np.random.default_rng(0)
    tree = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 5, 8)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        "key": jnp.asarray(rng.integers(0, 2**32, 8, dtype=np.uint32)),
        "byte": jnp.asarray(rng.integers(0, 255, (2, 8), dtype=np.uint8)),
        "step": jnp.int32(-7),
        "empty": jnp.zeros((0, 8), jnp.float32),
    }
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(tree, sharding.replicated(mesh))
    assert fingerprint(tree) == fingerprint(spread)
    one = {"x": jnp.asarray([1.5, -2.0], jnp.float32)}
    bits = np.asarray(one["x"]).view(np.uint32).astype(object)
    assert fingerprint(one) == (bits[0] + 3 * bits[1]) % 2**32


@pytest.mark.parametrize("place", [0, 39, 71])
def test_the_fingerprint_changes_with_a_bit(place):
    x = np.random.default_rng(0).normal(size=(3, 3, 8)).astype(np.float32)
    changed = x.copy()
    changed.reshape(-1).view(np.uint32)[place] ^= 1 << 31
    assert fingerprint({"x": jnp.asarray(x)}) != fingerprint({"x": jnp.asarray(changed)})
