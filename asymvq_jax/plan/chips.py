"""Chips, the topologies that they come in, and what a roofline says about a program on one of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from typing import Any

import jax
from jax.experimental import topologies

from asymvq_jax.devices.chips import CHIPS, GIB, SQUARE_SIDES, Chip
from asymvq_jax.errors import TopologyError

__all__ = ["CHIPS", "GIB", "Chip", "Roofline", "Target", "largest_fit", "open_topology", "roofline"]


@dataclass(frozen=True)
class Target:
    """Devices to compile for, and what is known of them."""

    name: str
    devices: Sequence[jax.Device]
    # None for a device that is not in CHIPS.
    chip: Chip | None
    # Names the compiler: programs compiled by another one may need more or less.
    compiler: str
    # The compiler's options that differ from its defaults.
    options: Mapping[str, Any] = field(default_factory=dict)


# libtpu compiles x2's step ten times faster with this, to nearly the same memory, FLOPs and collectives (docs/plan.md).
# JAX 0.12 has levels in its place.
QUICK: dict[str, float | str] = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O1"}
)


def open_topology(name: str, *, thorough: bool = False) -> Target:
    """The devices of "v5e:16x16" and the like, of several such slices ("2xv5e:16x16"), or with "local" those present.

    A TPU's are descriptions only: programs can be compiled for them, on a CPU, but not run.

    Args:
        name: the topology, by its sides or as in `by_sides`.
        thorough: whether to compile for it as for a run, instead of `QUICK`; for those present that is always so.

    Raises:
        TopologyError: no such topology, or libtpu is not installed.
    """
    if name == "local":
        devices: Sequence[jax.Device] = jax.devices()
        compiler = " ".join(devices[0].client.platform_version.split())
    else:
        name = by_sides(name)
        devices = _tpu_devices(name)
        compiler = f"libtpu {metadata.version('libtpu')}"
    chip = next((c for c in CHIPS if c.kind == devices[0].device_kind), None)
    options = {} if thorough or name == "local" else QUICK
    return Target(name, devices, chip, f"jax {jax.__version__}, {compiler}", options)


def by_sides(name: str) -> str:
    """A slice that is named by its number of chips, such as "v5e-4" or Google Cloud's "v5litepod-4", by its sides.

    Returns:
        Such as "v5e:2x2"; any other name as it is. A v5p's number counts cores and fits slices of several shapes.
    """
    found = re.fullmatch(r"((?:[1-9]\d*x)?)(v5e|v5litepod|v6e)-(\d+)", name)
    sides = SQUARE_SIDES.get(int(found[3])) if found else None
    return f"{found[1]}{found[2].replace('litepod', 'e')}:{sides}" if found and sides else name


def _tpu_devices(name: str) -> Sequence[jax.Device]:
    several = re.fullmatch(r"([1-9]\d*)x(.*)", name)
    slices, single = (int(several[1]), several[2]) if several else (1, name)
    version, _, sides = single.partition(":")
    chip = next((c for c in CHIPS if c.name == version), None)
    known = "; ".join(f"{c.name}: {', '.join(c.examples)}" for c in CHIPS)
    if chip is None or not re.fullmatch(r"\d+(x\d+)+", sides) or sides.count("x") != chip.examples[0].count("x"):
        raise TopologyError(
            f"--topology {name}: expected local, or a chip and the sides of a slice, like v5e:16x16 (2xv5e:16x16: two "
            f"of them), or for v5e and v6e its number of chips, like v5e-256; known are {known}"
        )
    if util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology {name} needs libtpu, Google's compiler for TPUs, which runs on any x86-64 Linux; "
            "install it in a clone with: pip install -e '.[tpu]'"
        )
    # libtpu would ask the machine which TPU it has, but there may be none, and several processes may compile at once.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(variable, value)
    # libtpu assumes four chips per host unless an option says otherwise.
    bounds: dict[str, Any] = {}
    if math.prod(map(int, sides.split("x"))) == 1:
        bounds["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        bounds["num_slices"] = slices
    try:
        return topologies.get_topology_desc(single, "tpu", **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"--topology {name}: {str(error).splitlines()[0]}; known are {known}") from None


@dataclass(frozen=True)
class Roofline:
    """The least time of a step on one chip; seconds, and shares of 1."""

    seconds: float
    # What sets the time: "arithmetic", "memory traffic", or a network.
    bound: str
    # Model FLOPs utilisation: the model's own FLOPs, without recomputation, per peak FLOP of that time.
    mfu: float


def roofline(
    chip: Chip, flops: float, moved: float, model_flops: float, network: Mapping[str, float] | None = None
) -> Roofline:
    """The longest of FLOPs / peak, bytes / bandwidth and networks: a step's time if it hides the others.

    Args:
        chip: the chip.
        flops: what it computes in a step, recomputation included.
        moved: bytes between it and its memory in a step.
        model_flops: its share of what the model needs, recomputation left out.
        network: seconds that its collectives take, by the name of the network.
    """
    times = {"arithmetic": flops / chip.peak, "memory traffic": moved / chip.bandwidth, **(network or {})}
    bound = max(times, key=times.__getitem__)
    return Roofline(times[bound], bound, model_flops / (chip.peak * times[bound]))


def largest_fit(
    look: Callable[[int], tuple[float, bool]], limit: float, start: int, budget: int
) -> tuple[int, int | None]:
    """The largest n that fits, in few looks: memory grows about linearly in n, so that two looks foretell the third.

    Args:
        look: the memory that n needs, in the unit of `limit`, and whether n fits, which is for the caller to judge.
        limit: the memory there is.
        start: the first n to look at.
        budget: the most n to look at.

    Returns:
        The largest n seen to fit (0: none), and the least seen not to (None: none).
    """
    needs: dict[int, float] = {}
    good, bad = 0, None
    guess = start
    while len(needs) < budget and bad != good + 1:
        needs[guess], fits = look(guess)
        if fits:
            good = max(good, guess)
        else:
            bad = guess if bad is None else min(bad, guess)
        if len(needs) == 1:
            guess = 2 * start if fits else max(1, start // 2)
        else:
            (a, low), (b, high) = sorted(needs.items(), key=lambda item: abs(item[1] - limit))[:2]
            slope = (high - low) / (b - a)
            guess = int(a + (limit - low) / slope) if slope > 0 else 2 * max(a, b)
        # Always between what fits and what does not.
        guess = max(guess, good + 1) if bad is None else min(max(guess, good + 1), bad - 1)
    return good, bad
