"""Modules as flat dictionaries of arrays under dotted names, the form in which the rest of the code handles weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]
M = TypeVar("M", bound=nnx.Module)
P = ParamSpec("P")
R = TypeVar("R")


def split(model: M, *filters: Any) -> tuple[Any, ...]:
    """Separates a module into its structure and its arrays, by name ("decoder.levels.0.blocks.1.conv1.bias").

    Args:
        model: the module.
        filters: types of variables (nnx.Param, ...); one dictionary is returned for each, or one for all without any.

    Returns:
        The graph definition, then the dictionaries.
    """
    graphdef, *states = nnx.split(model, *filters)
    return graphdef, *(_flatten(state) for state in states)


def state_of(model: nnx.Module, kind: type[nnx.Variable[Any]]) -> Params:
    """The arrays of one type of variable, by name."""
    return _flatten(nnx.state(model, kind))


def _flatten(state: nnx.State[Any, Any]) -> Params:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef[M], params: dict[str, Any]) -> M:
    """The inverse of `split`."""
    flat = [(tuple(int(p) if p.isdigit() else p for p in name.split(".")), value) for name, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


class _Keys:
    def __init__(self, seed: int | jax.Array) -> None:
        self._key = jax.random.key(seed) if isinstance(seed, int) else seed
        self._count = itertools.count()

    def params(self) -> jax.Array:
        return jax.random.fold_in(self._key, next(self._count))


def seeded(seed: int | jax.Array) -> nnx.Rngs:
    """Keys as `nnx.Rngs(seed)` gives them for parameters, made faster inside a trace; has `params()` only.

    `nnx.Rngs` keeps its count in an array and reads that array's sharding for every key. Inside a trace JAX raises an
    error there, and composing its message takes four times as long as all initialisers (flax 0.12, jax 0.10).
    """
    return cast(nnx.Rngs, _Keys(seed))


def jitted(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`nnx.jit` of a function that changes nothing in its modules; `options` are those of `jax.jit`.

    By default nnx returns every parameter from the program in case it has changed, and XLA copies it at each call (flax
    0.12): as much memory again as the weights take, the encoder's too where only the decoder runs.
    """
    program: Callable[P, R] = nnx.jit(function, graph=False, **options)
    return program


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree of arrays is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def fingerprint(tree: Any) -> int:
    """A number of 32 bits that changes with any bit of a tree of arrays, the same on every mesh.

    Checkpoints keep it, because TensorStore's checksums cover its indices and not the numbers (Nov 2026).
    """
    leaves = jax.tree.leaves(tree)
    # What CPU devices hold whole is the host's, and XLA would compile for longer than NumPy takes.
    on_cpu = {device.platform for x in leaves for device in x.devices()} == {"cpu"}
    if on_cpu and all(x.is_fully_replicated for x in leaves):
        sums = [_host_sum(np.asarray(x)) for x in leaves]
    else:
        sums = [int(x) for x in jax.device_get(_device_sums(leaves))]
    total = 0
    for each in sums:
        total = (31 * total + each) % 2**32
    return total


_UNSIGNED = {4: np.uint32, 2: np.uint16, 1: np.uint8}


def _host_sum(x: np.ndarray) -> int:
    """As `_device_sums`, of one array in the host's memory."""
    size = x.shape[-1] if x.ndim else 1
    bits = np.ascontiguousarray(x).reshape(-1, size).view(_UNSIGNED[x.dtype.itemsize])
    # In uint32, which wraps around.
    columns = bits.sum(axis=0, dtype=np.uint32)
    return int((columns * (2 * np.arange(size, dtype=np.uint32) + 1)).sum(dtype=np.uint32))


@jax.jit
def _device_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Sums, modulo 2**32, of each array's bits times odd factors, computed where they lie."""
    result = []
    for x in leaves:
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
        # Odd factors lose no bit modulo 2**32; those of the last axis are enough to tell neighbours apart.
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1) if x.ndim else jnp.uint32(0)
        result.append(jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32))
    return result
