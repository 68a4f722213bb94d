"""Modules as flat dictionaries of arrays under dotted names, the form in which the rest of the code handles weights."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

Params = dict[str, jax.Array]
M = TypeVar("M", bound=nnx.Module)


def split(model: M) -> tuple[nnx.GraphDef[M], Params]:
    """Separates a module into its structure and its arrays, by name ("decoder.levels.0.blocks.1.conv1.bias")."""
    graphdef, state = nnx.split(model)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef[M], params: dict[str, Any]) -> M:
    """The inverse of `split`."""
    flat = [(tuple(int(p) if p.isdigit() else p for p in name.split(".")), value) for name, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
