"""What is said about a compiled program: whether it fits, its numbers, and both as text."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from asymvq_jax.config import Config
from asymvq_jax.devices import sharding
from asymvq_jax.devices.chips import Chip
from asymvq_jax.plan.chips import GIB, Target, roofline
from asymvq_jax.plan.compile import Program, ways
from asymvq_jax.plan.counting import BETWEEN_SLICES
from asymvq_jax.plan.parts import Part


def fits(program: Program, target: Target) -> bool:
    """Whether the compiler took it and the chip's memory, where it is known, holds it."""
    return program.exceeded is None and (target.chip is None or program.memory.peak <= target.chip.memory)


def verdict(program: Program, target: Target) -> str:
    """Its peak memory beside the chip's, and by how much it is too much."""
    peak = program.memory.peak
    if target.chip is None:
        return binary(peak)
    limit = program.exceeded or target.chip.memory
    excess = "fits" if fits(program, target) else f"too much by {binary(peak - limit)}"
    return f"{binary(peak)} of {binary(limit)}: {excess}"


def binary(size: float) -> str:
    """Bytes with a unit, powers of 1024."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def decimal(value: float) -> str:
    """A number of three digits with the prefix of its unit, powers of 1000."""
    power = min(max(math.floor(math.log10(value) / 3), -2), 5) if value else 0
    return f"{value / 1000**power:.3g} {('μ', 'm', '', 'k', 'M', 'G', 'T', 'P')[power + 2]}"


def heading(config: Config, target: Target, path: str) -> str:
    """Three lines: the chips and the mesh, the batch, the compiler."""
    mesh = sharding.make_mesh(config.mesh, target.devices)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    each = config.data.batch_size // ways(config, target)
    return (
        f"{path} on {target.name}: {mesh.size} x {target.devices[0].device_kind} ({axes})\n"
        f"{config.data.image_size} px, batch {config.data.batch_size} ({each} a chip), {config.model.dtype}\n"
        f"compiled with {target.compiler}"
    )


def listing(name: str, program: Program, batch: int, target: Target) -> str:
    """A program's numbers, one a line; `batch` pictures are what one run makes on all chips."""
    memory, values = program.memory, numbers(program, batch, target)
    rows = [
        ("parameters", binary(memory.parameters)),
        ("optimizer state", binary(memory.optimizer)),
        ("other arguments", binary(memory.other)),
        ("temporaries", binary(memory.temporaries)),
        ("program", binary(memory.code)),
        ("peak memory", verdict(program, target)),
        ("arithmetic", f"{decimal(program.flops)}FLOP, by the shapes of convolutions and products"),
    ]
    rows += [("  " + part.name, _share(part, program.flops)) for part in program.parts]
    if program.compiler_flops is not None and program.moved is not None:
        doubt = "" if program.plausible else "; they disagree, and what follows is by the shapes"
        rows += [
            ("", f"{decimal(program.compiler_flops)}FLOP, by the compiler{doubt}"),
            ("memory traffic", f"{decimal(program.moved)}B"),
        ]
    rows += [(c.kind, f"{decimal(c.bytes)}B over {' x '.join(c.axes)}, in {c.count}") for c in program.collectives]
    if "seconds" in values:
        if program.collectives:
            times = [f"{decimal(s)}s {where}" for where, s in values["network seconds"].items() if s]
            rows += [("network", f"{' and '.join(times)}, at least; it may overlap with the rest")]
        rows += [
            ("least time", f"{decimal(values['seconds'])}s, set by {values['bound']}"),
            ("most speed", f"{values['images per second']:.1f} images/s on all chips, MFU {values['mfu']:.1%}"),
        ]
    return "\n".join([f"\n{name}, on each chip"] + [f"  {label:<31}{value}" for label, value in rows])


def _share(part: Part, flops: float) -> str:
    """A part's arithmetic, its share of the whole, and what it does beyond the least."""
    beyond = part.flops - part.least
    more = f"; {decimal(beyond)}FLOP more than the losses need" if beyond > 1e-3 * part.least else ""
    return f"{decimal(part.flops)}FLOP, {part.flops / flops:.1%}{more}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least that a run takes: hours, chip-hours, and what they cost."""

    steps: int
    pictures: int
    hours: float
    chip_hours: float
    money: float

    def describe(self) -> str:
        """Two lines."""
        return (
            f"\nrun.steps={self.steps} of {self.pictures} pictures: at least {self.hours:.3g} hours, "
            f"{self.chip_hours:.4g} chip-hours, {self.money:.4g} at the price given\n"
            "  a bound, not an estimate: steps at the least time above, without compilation, input, evaluation, "
            "checkpoints and restarts"
        )


def cost(program: Program, config: Config, target: Target, price: float) -> Cost | None:
    """What run.steps of a training step take at least; None where nothing is known of the step's time.

    Args:
        program: the training step.
        config: the run.
        target: the chips.
        price: for an hour of one chip.
    """
    values = numbers(program, config.data.batch_size, target)
    if "seconds" not in values:
        return None
    hours = values["seconds"] * config.run.steps / 3600
    chip_hours = hours * len(target.devices)
    return Cost(config.run.steps, config.data.batch_size, hours, chip_hours, chip_hours * price)


def network_seconds(program: Program, chip: Chip) -> dict[str, float]:
    """The least time of a program's collectives on each network, by the chips' published bandwidths."""
    sent = {True: 0.0, False: 0.0}
    for each in program.collectives:
        sent[each.kind == BETWEEN_SLICES] += each.sent()
    return {"in a slice": sent[False] / chip.ici, "between slices": sent[True] / chip.dcn}


def numbers(program: Program, batch: int, target: Target) -> dict[str, Any]:
    """All numbers of a program: bytes, FLOPs and seconds on one chip, images a second on all."""
    values = dataclasses.asdict(program)
    values["memory"]["peak"] = program.memory.peak
    values["fits"] = fits(program, target)
    if target.chip is not None and program.moved is not None:
        flops = max(program.flops, program.compiler_flops or 0.0) if program.plausible else program.flops
        network = network_seconds(program, target.chip)
        named = {f"the network {where}": seconds for where, seconds in network.items()}
        least = roofline(target.chip, flops, program.moved, program.model_flops, named)
        values |= {
            "seconds": least.seconds,
            "bound": least.bound,
            "images per second": batch / least.seconds,
            "mfu": least.mfu,
            "network seconds": network,
        }
    return values
