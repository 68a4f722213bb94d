"""Modules' parameters: the number that tells whether they are those that were written, and programs that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from asymvq_jax.devices import sharding
from asymvq_jax.models.parameters import fingerprint, jitted, seeded


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
    last = {
        name: PartitionSpec(*[None] * (x.ndim - 1), "data") if x.ndim else PartitionSpec() for name, x in tree.items()
    }
    spread = jax.device_put(tree, {name: NamedSharding(mesh, spec) for name, spec in last.items()})
    assert fingerprint(tree) == fingerprint(spread) == fingerprint(jax.device_put(tree, sharding.replicated(mesh)))
    one = {"x": jnp.asarray([1.5, -2.0], jnp.float32)}
    bits = np.asarray(one["x"]).view(np.uint32).astype(object)
    assert fingerprint(one) == (bits[0] + 3 * bits[1]) % 2**32


@pytest.mark.parametrize("place", [0, 39, 71])
def test_the_fingerprint_changes_with_a_bit(place):
    x = np.random.default_rng(0).normal(size=(3, 3, 8)).astype(np.float32)
    changed = x.copy()
    changed.reshape(-1).view(np.uint32)[place] ^= 1 << 31
    assert fingerprint({"x": jnp.asarray(x)}) != fingerprint({"x": jnp.asarray(changed)})


def test_programs_take_the_parameters_that_they_read_and_return_none():
    """So XLA copies none of them; in nnx.jit's other mode all are arguments and results."""
    model = nnx.List([nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(3)])
    x = jnp.ones((2, 64))

    def second(model: nnx.List, x: jax.Array, *, double: bool) -> jax.Array:
        return model[1](x) * (2 if double else 1)

    program = jitted(second, static_argnames="double")
    compiled = program.lower(model, x, double=True).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 4 * (64 * 64 + 64 + 2 * 64)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * (2 * 64) + 64
    np.testing.assert_array_equal(compiled(model, x), program(model, x, double=True))
    np.testing.assert_allclose(program(model, x, double=True), 2 * model[1](x), rtol=1e-5)


@pytest.mark.parametrize("seed", [3, jax.random.fold_in(jax.random.key(1), 2)], ids=["number", "key"])
def test_seeded_gives_the_keys_of_nnx(seed):
    """And in their order, inside a trace as outside."""

    def drawn(rngs):
        return [jax.random.key_data(rngs.params()) for _ in range(3)]

    expected = drawn(nnx.Rngs(seed))
    assert len({key.tobytes() for key in map(np.asarray, expected)}) == 3
    for keys in (drawn(seeded(seed)), jax.jit(lambda: drawn(seeded(seed)))()):
        np.testing.assert_array_equal(keys, expected)
