"""Plans one config for many slices: python -m asymvq_jax.plan.table --config configs/x2.py --per-chip 8.

Prints a markdown table, a row as soon as its programs are compiled. Any field of the config can be set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, load_config
from asymvq_jax.errors import UserError
from asymvq_jax.plan import report
from asymvq_jax.plan.chips import Target, open_topology
from asymvq_jax.plan.compile import Program, plan_decode, plan_step, ways, with_batch

# 4, 16, 64 and 256 chips of each kind.
TOPOLOGIES = (
    "v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16,v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8,v6e:2x2,v6e:4x4,v6e:8x8,v6e:16x16"
)
COLUMNS = ("slice", "batch", "parameters", "optimizer state", "temporaries", "peak memory", "arithmetic", "traffic",
           "collectives", "least time", "images/s", "MFU", "decode: peak memory", "images/s")  # fmt: skip


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.plan.table", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    parser.add_argument("--per-chip", type=int, default=8, help="pictures a chip (along data x fsdp)")
    parser.add_argument("--topologies", default=TOPOLOGIES, help="comma-separated; default: %(default)s")
    options, overrides = parser.parse_known_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.per_chip < 1:
        raise UserError(f"--per-chip={options.per_chip}: expected at least 1")
    config = load_config(options.config, overrides)
    targets = [open_topology(name) for name in options.topologies.split(",")]
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        _print(line)
    for target in targets:
        _print(_row(with_batch(config, options.per_chip * ways(config, target)), target))
    return 0


def _print(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _row(config: Config, target: Target) -> list[str]:
    step, decode = plan_step(config, target), plan_decode(config, target)
    memory = step.memory
    return [
        target.name,
        str(config.data.batch_size),
        report.binary(memory.parameters),
        report.binary(memory.optimizer),
        report.binary(memory.temporaries),
        report.verdict(step, target),
        f"{report.decimal(step.flops)}FLOP",
        "" if step.moved is None else f"{report.decimal(step.moved)}B",
        "; ".join(f"{c.kind} {report.decimal(c.bytes)}B in {c.count}" for c in step.collectives),
        *_speed(step, config, target),
        report.verdict(decode, target),
        _speed(decode, config, target)[1],
    ]


def _speed(program: Program, config: Config, target: Target) -> list[str]:
    """The least time, the images a second of all chips, and the MFU; empty where the program does not fit."""
    values = report.numbers(program, config.data.batch_size, target)
    if "seconds" not in values:
        return ["", "", ""]
    return [
        f"{report.decimal(values['seconds'])}s",
        f"{values['images per second']:.4g}",
        f"{values['mfu']:.0%}",
    ]
