"""The arithmetic of a program, counted from the shapes in its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of a jaxpr's convolutions and matrix products: two for each product with an element that exists.

    Zeros that padding or dilation put in do not count. A loop of unknown length counts once, of a conditional the
    dearest branch, and of a choice by platform the default, which accelerators take.
    """
    total = 0.0
    platforms = {e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "platform_index"}
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            lhs, rhs, out = (x.aval.shape for x in (*equation.invars, *equation.outvars))
            total += _convolution(lhs, rhs, out, params)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif name == "cond":
            branches = params["branches"][-1:] if equation.invars[0] in platforms else params["branches"]
            total += max(map(matmul_flops, _inner(branches)))
        else:
            total += _repeats(name, params) * sum(map(matmul_flops, _inner(params.values())))
    return total


def _repeats(name: str, params: Mapping[str, Any]) -> int:
    """How often the jaxpr inside an equation runs: loops, kernels over their grid, and parts of a mesh."""
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return int(params["mesh"].size) if name == "shard_map" else 1


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _convolution(lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], params: Mapping[str, Any]) -> float:
    numbers = params["dimension_numbers"]
    flops = 2.0 * lhs[numbers.lhs_spec[0]] * rhs[numbers.rhs_spec[0]] * rhs[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        # Where each element of the output and of the kernel meet, in units of the dilated input.
        at = (
            np.add.outer(
                np.arange(out[numbers.out_spec[i + 2]]) * params["window_strides"][i],
                np.arange(rhs[numbers.rhs_spec[i + 2]]) * params["rhs_dilation"][i],
            )
            - low
        )
        step = params["lhs_dilation"][i]
        flops *= np.count_nonzero((at >= 0) & (at <= (lhs[numbers.lhs_spec[i + 2]] - 1) * step) & (at % step == 0))
    return float(flops / params["batch_group_count"])
