"""Modules as flat dictionaries of arrays under dotted names, the form in which the rest of the code handles weights."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
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
