"""Modules as flat dictionaries of arrays under dotted names, the form in which the rest of the code handles weights."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, jax.Array]
M = TypeVar("M", bound=nnx.Module)


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


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number in a tree of arrays is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A uint32 that changes with any bit of a tree of arrays, computed where they lie, the same on every mesh.

    Checkpoints keep it, because TensorStore's checksums cover its indices and not the numbers (Nov 2026).
    """
    total: jax.Array = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        unsigned = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        # Odd factors lose no bit modulo 2**32; those of the last axis are enough to tell neighbours apart.
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1) if x.ndim else jnp.uint32(0)
        total = total * jnp.uint32(31) + jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)
    return total
