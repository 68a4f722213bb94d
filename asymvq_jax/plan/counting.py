"""What a program does, counted: collectives in a compiled HLO module's text, FLOPs in a jaxpr."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.interpreters import partial_eval

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COLLECTIVE = re.compile(rf" = ([^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclass(frozen=True)
class Collective:
    """All of a program's collectives of one kind over the same mesh axes, on one chip and in one run."""

    kind: str
    axes: tuple[str, ...]
    count: int
    # The whole arrays: what an all-reduce sums, an all-gather ends with, a reduce-scatter begins with.
    bytes: int


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Counts the collectives of a compiled module.

    Args:
        hlo: the module's text. Its device ids are positions in the mesh.
        mesh: sizes by axis, the last one varying fastest.

    Returns:
        One entry for each kind and set of axes, the one with most bytes first. What stands in a loop counts as often
        as the loop runs, where the compiler wrote that down, and once where it did not.
    """
    runs = _runs(hlo)
    count: Counter[tuple[str, tuple[str, ...]]] = Counter()
    size: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for name, line in _instructions(hlo):
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        result, kind, start = match.groups()
        groups = _groups(line, math.prod(mesh.values()))
        payload = _payload(result, kind, bool(start), max(map(len, groups)))
        # libtpu writes a reduce-scatter as an all-reduce and the slicing of its result, in a fusion of this name.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        key = kind, _axes(groups, mesh)
        count[key] += runs[name]
        size[key] += runs[name] * payload
    entries = [Collective(kind, axes, n, size[kind, axes]) for (kind, axes), n in count.items() if axes]
    return sorted(entries, key=lambda entry: -entry.bytes)


def _instructions(hlo: str) -> Iterator[tuple[str, str]]:
    """Every instruction's line, without comments, and with the name of its computation."""
    name = ""
    for line in hlo.splitlines():
        if line.startswith("  "):
            yield name, re.sub(r"/\*.*?\*/", "", line)
        elif match := _COMPUTATION.match(line):
            name = match[2]


def _runs(hlo: str) -> Counter[str]:
    """How often each computation runs in one run of the module."""
    called: dict[str, list[str]] = defaultdict(list)
    constants: dict[str, list[int]] = defaultdict(list)
    loops: list[tuple[str, str]] = []
    for name, line in _instructions(hlo):
        if value := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            constants[name].append(int(value[1]))
        if " while(" in line:
            loops.append((name, line))
        # The end of an asynchronous operation names the computation that its start has begun.
        elif not re.search(r" async-(update|done)\(", line):
            called[name] += _callees(line)
    trips = {(name, callee): _trips(line, constants) for name, line in loops for callee in _callees(line)}
    for name, callee in trips:
        called[name].append(callee)
    runs: Counter[str] = Counter()
    pending = [(match[2], 1) for match in map(_COMPUTATION.match, hlo.splitlines()) if match and match[1]]
    while pending:
        name, times = pending.pop()
        runs[name] += times
        pending += [(callee, times * trips.get((name, callee), 1)) for callee in called[name]]
    return runs


def _callees(line: str) -> list[str]:
    return [name.strip(" %") for text in _CALLED.findall(line) for name in text.strip("{}").split(",")]


def _trips(loop: str, constants: Mapping[str, list[int]]) -> int:
    """How often a while loop runs: as noted on it, or by the one constant that its condition compares with; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop)
    bounds = constants[condition[1]] if condition else []
    return bounds[0] if len(bounds) == 1 else 1


def _payload(result: str, kind: str, start: bool, group: int) -> int:
    """Bytes of a collective's whole arrays, from the text of its result's type."""
    sizes = [
        int(bits or 8) / 8 * math.prod(int(n) for n in shape.split(",") if n)
        for _, bits, shape in _ARRAY.findall(result)
        if shape or not start
    ]
    if start and kind in ("all-gather", "collective-permute"):
        # The operands stand before the results.
        sizes = sizes[len(sizes) // 2 :]
    return round(sum(sizes) * (group if kind == "reduce-scatter" else 1))


def _groups(line: str, devices: int) -> list[list[int]]:
    """The sets of devices that take part in a collective together, by position in the mesh."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if match := _MESH.search(line):
        return _mesh_groups(*match.groups())
    if match := re.search(r"replica_groups=(\[\S+\](?:T\([\d,]+\))?)", line):
        return [[int(n) for n in group] for group in _iota(match[1])]
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """ "[2,4]<=[8]T(1,0)": the numbers from 0 in the second shape, transposed, in the first shape."""
    match = _IOTA.match(text)
    if match is None:
        raise ValueError(f"not a list of devices: {text!r}")
    shape, source, order = ([int(n) for n in part.split(",")] if part else [] for part in match.groups())
    ids = np.arange(math.prod(shape)).reshape(source or shape)
    return ids.transpose(order).reshape(shape) if order else ids.reshape(shape)


def _mesh_groups(sizes: str, ids: str | None, axes: str) -> list[list[int]]:
    """The form mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}: groups along axes, or parts of axes."""
    names = dict(re.findall(r"'([^']+)'=(\d+)", sizes))
    shape = [int(n) for n in names.values()]
    if ids is None:
        devices = np.arange(math.prod(shape))
    elif ids.startswith("["):
        devices = _iota(ids).ravel()
    else:
        devices = np.array([int(n) for n in ids.split(",")])
    rest = np.stack(np.unravel_index(np.arange(devices.size), shape), axis=-1)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        axis = list(names).index(name)
        size = int(size or shape[axis])
        stride = shape[axis] // (int(before or 1) * size)
        rest[:, axis] -= rest[:, axis] // stride % size * stride
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for device, key in zip(devices.tolist(), rest.tolist(), strict=True):
        groups[tuple(key)].append(device)
    return list(groups.values())


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh's axes along which the members of a group differ."""
    places = [np.stack(np.unravel_index(group, list(mesh.values()))) for group in groups]
    return tuple(axis for i, axis in enumerate(mesh) if any(np.ptp(place[i]) for place in places))


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
