"""One plan as a row of a table."""

from __future__ import annotations

from asymvq_jax.config import Config
from asymvq_jax.plan import compile as compiling
from asymvq_jax.plan import report
from asymvq_jax.plan.chips import Target
from asymvq_jax.plan.compile import Program

COLUMNS = ("slice", "batch", "parameters", "optimizer state", "temporaries", "peak memory", "arithmetic", "traffic",
           "collectives", "least time", "images/s", "MFU", "decode: peak memory", "images/s")  # fmt: skip


def row(config: Config, target: Target) -> list[str]:
    """The cells of `COLUMNS` for one configuration on one slice."""
    step, decode = compiling.plan_step(config, target), compiling.plan_decode(config, target)
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
