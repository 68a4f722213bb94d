"""What to change so that a run fits: the batch, and settings that take less memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from asymvq_jax.config import Config
from asymvq_jax.plan import compile as compiling
from asymvq_jax.plan import report
from asymvq_jax.plan.chips import Target, largest_fit
from asymvq_jax.plan.compile import ways, with_batch

# More would gather kernels in slivers, and the state is small by then.
MOST_FSDP = 8
# Compilations of a search for the largest batch.
SEARCH_BUDGET = 6


def split_batch(config: Config, target: Target) -> Config:
    """The config, with the next larger batch that splits evenly over the chips if its own does not; says so."""
    multiple = ways(config, target) * config.optimizer.accumulate
    batch = math.ceil(config.data.batch_size / multiple) * multiple
    if batch != config.data.batch_size:
        print(
            f"note: data.batch_size={config.data.batch_size} does not split over {multiple} micro-batches of the "
            f"chips; this plan is for --data.batch_size={batch}"
        )
    return with_batch(config, batch)


def variants(config: Config, target: Target) -> dict[str, Config]:
    """Changes that take less memory, by the overrides that make them."""
    result: dict[str, Config] = {}
    if not config.model.remat:
        result["--model.remat=true"] = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
    chips = ways(config, target)
    fsdp = max(n for n in range(1, MOST_FSDP + 1) if chips % n == 0)
    if fsdp > config.mesh.fsdp:
        mesh = dataclasses.replace(config.mesh, data=chips // fsdp, fsdp=fsdp)
        result[f"--mesh.data={mesh.data} --mesh.fsdp={fsdp}"] = dataclasses.replace(config, mesh=mesh)
    count = 2 * config.optimizer.accumulate
    if config.data.batch_size % (chips * count) == 0:
        optimizer = dataclasses.replace(config.optimizer, accumulate=count)
        result[f"--optimizer.accumulate={count}"] = dataclasses.replace(config, optimizer=optimizer)
    return result


def suggest(changes: dict[str, Config], target: Target) -> dict[str, Any]:
    """Compiles the variants and prints which of them fit."""
    result = {}
    for flags, config in changes.items():
        program = compiling.plan_step(config, target)
        print(f"  with {flags}: {report.verdict(program, target)}", flush=True)
        result[flags] = report.numbers(program, config.data.batch_size, target)
    return result


def search(config: Config, target: Target) -> int:
    """Finds and prints the largest batch per chip that fits, keeping everything else."""
    assert target.chip is not None
    unit = ways(config, target) * config.optimizer.accumulate

    def look(micro_batch: int) -> tuple[float, bool]:
        program = compiling.plan_step(with_batch(config, micro_batch * unit), target)
        return program.memory.peak, report.fits(program, target)

    good, bad = largest_fit(look, target.chip.memory, start=config.data.batch_size // unit, budget=SEARCH_BUDGET)
    each = good * config.optimizer.accumulate
    if good == 0:
        print(f"largest batch: none fits, not even {bad} a chip")
    else:
        end = f"{bad * config.optimizer.accumulate} does not" if bad else "more may"
        print(f"largest batch: {each} a chip fits (--data.batch_size={good * unit}); {end}", flush=True)
    return each
