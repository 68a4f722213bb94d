"""What a program does, read from a compiled HLO module's text: its operations, and its collectives counted."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

# What a chip sends to the other slices, which libtpu compiles to transfers by the hosts.
BETWEEN_SLICES = "between slices"

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][\w-]*)\(")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SEND = re.compile(r" = \(([^()]*(?:\([^()]*\)[^()]*)*)\) send\(.*_xla_megascale")
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
    # The whole arrays: what an all-reduce sums, an all-gather ends with, a reduce-scatter begins with. Between slices
    # what the chip sends.
    bytes: int

    def sent(self) -> float:
        """Bytes that a chip sends at least, in a large group: an all-reduce's arrays twice, others' once."""
        return 2.0 * self.bytes if self.kind == "all-reduce" else float(self.bytes)


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
    key: tuple[str, tuple[str, ...]]
    for name, line in instructions(hlo):
        match = _COLLECTIVE.search(line)
        if match is None:
            if sent := _SEND.search(line):
                key = BETWEEN_SLICES, ("slices",)
                count[key] += runs[name]
                size[key] += runs[name] * _payload(sent[1].partition(", u32[]")[0], BETWEEN_SLICES, False, 1)
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


def instructions(hlo: str) -> Iterator[tuple[str, str]]:
    """Every instruction's line, without comments, and with the name of its computation."""
    name = ""
    for line in hlo.splitlines():
        if line.startswith("  "):
            yield name, re.sub(r"/\*.*?\*/", "", line)
        elif match := _COMPUTATION.match(line):
            name = match[2]


def operation(line: str) -> tuple[str, str] | None:
    """The name of an instruction, and what it does: HLO's opcode, or the target of a custom call in lower case.

    None: the line is not an instruction.
    """
    match, target = _INSTRUCTION.match(line), _TARGET.search(line)
    return match and (match[1], target[1].lower() if target else match[2])


def in_scope(line: str, name: str) -> bool:
    """Whether what an instruction computes was traced inside a `jax.named_scope`."""
    return re.search(rf'op_name="[^"]*\b{re.escape(name)}\b', line) is not None


def _runs(hlo: str) -> Counter[str]:
    """How often each computation runs in one run of the module."""
    called: dict[str, list[str]] = defaultdict(list)
    constants: dict[str, list[int]] = defaultdict(list)
    loops: list[tuple[str, str]] = []
    for name, line in instructions(hlo):
        if value := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            constants[name].append(int(value[1]))
        if " while(" in line:
            loops.append((name, line))
        # The end of an asynchronous operation names the computation that its start has begun.
        elif not re.search(r" async-(update|done)\(", line):
            called[name] += callees(line)
    trips = {(name, callee): _trips(line, constants) for name, line in loops for callee in callees(line)}
    for name, callee in trips:
        called[name].append(callee)
    runs: Counter[str] = Counter()
    pending = [(match[2], 1) for match in map(_COMPUTATION.match, hlo.splitlines()) if match and match[1]]
    while pending:
        name, times = pending.pop()
        runs[name] += times
        pending += [(callee, times * trips.get((name, callee), 1)) for callee in called[name]]
    return runs


def callees(line: str) -> list[str]:
    """The computations that an instruction's line names."""
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
