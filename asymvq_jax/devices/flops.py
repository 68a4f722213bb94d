"""The arithmetic of a program, counted from the shapes in its jaxpr."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.interpreters import partial_eval


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of a jaxpr's convolutions and matrix products: two for each product with an element that exists.

    Zeros that padding or dilation put in do not count. A loop of unknown length counts once, of a conditional the
    dearest branch, and of a choice by platform the default, which accelerators take.
    """
    return math.fsum(scoped_flops(jaxpr).values())


def scoped_flops(jaxpr: Any) -> dict[str, float]:
    """`matmul_flops` by the scope in which an operation stands, such as "transpose(jvp(decoder))/condition"."""
    total: defaultdict[str, float] = defaultdict(float)
    platforms = {e.outvars[0] for e in jaxpr.eqns if e.primitive.name == "platform_index"}
    for equation in jaxpr.eqns:
        name, params, scope = equation.primitive.name, equation.params, str(equation.source_info.name_stack)
        if name == "conv_general_dilated":
            lhs, rhs, out = (x.aval.shape for x in (*equation.invars, *equation.outvars))
            total[scope] += _convolution(lhs, rhs, out, params)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total[scope] += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif name == "cond":
            branches = params["branches"][-1:] if equation.invars[0] in platforms else params["branches"]
            dearest = max((scoped_flops(inner) for inner in _inner(branches)), key=lambda found: sum(found.values()))
            for inside, flops in dearest.items():
                total[f"{scope}/{inside}"] += flops
        else:
            repeats = _repeats(name, params)
            for inner in _inner(params.values()):
                for inside, flops in scoped_flops(inner).items():
                    total[f"{scope}/{inside}"] += repeats * flops
    return total


def needed(jaxpr: Any) -> Any:
    """A jaxpr without the operations whose results nothing reads, which no compiler keeps."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


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
