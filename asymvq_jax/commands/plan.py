"""Plans a run: python -m asymvq_jax.plan --config configs/x2.py --topology v5e:16x16 [--data.batch_size=2048 ...].

Compiles the training step and the decode for chips that need not be present, and prints what one chip needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, load_config
from asymvq_jax.devices import sharding
from asymvq_jax.errors import UserError
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable, write_bytes
from asymvq_jax.plan import report
from asymvq_jax.plan.chips import Target, largest_fit, open_topology
from asymvq_jax.plan.compile import plan_decode, plan_picture, plan_step, ways, with_batch

log = logging.getLogger(__name__)

# More would gather kernels in slivers, and the state is small by then.
MOST_FSDP = 8
# Compilations of a search for the largest batch.
SEARCH_BUDGET = 6


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 (also where the plan does not fit), or 2 after an error message."""
    parser = argparse.ArgumentParser(
        prog="python -m asymvq_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any field of the config can be set: --group.field=value",
    )
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    parser.add_argument("--topology", default="local", help="v5e:16x16, v5p:4x4x4, ...; default: the devices present")
    parser.add_argument("--suggest", action="store_true", help="if it does not fit, compile variants that may")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits; implies --suggest")
    parser.add_argument("--picture", metavar="HEIGHTxWIDTH", help="plan the decode of one picture over all chips only")
    parser.add_argument("--thorough", action="store_true", help="compile for a TPU as a run does, ten times slower")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    options, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    _run(options, overrides)
    return 0


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if options.json:
        check_writable(options.json, (".json",))
    config = load_config(options.config, overrides)
    if options.topology != "local":
        # The devices present are not needed; a TPU among them stays free for others.
        jax.config.update("jax_platforms", "cpu")
    target = open_topology(options.topology, thorough=options.thorough)
    if options.search and target.chip is None:
        kind = target.devices[0].device_kind
        raise UserError(f"--search: the memory of {kind} is not known; name a chip's with --topology")
    if options.picture:
        _picture(options, config, target)
        return
    config = _split_batch(config, target)
    print(report.heading(config, target, options.config))
    programs = {"train step": plan_step(config, target)}
    print(report.listing("train step", programs["train step"], config.data.batch_size, target), flush=True)
    numbers: dict[str, Any] = {}
    if not report.fits(programs["train step"], target):
        changes = _variants(config, target)
        if options.suggest or options.search:
            numbers["variants"] = _suggest(changes, target)
        else:
            print(f"  to try: {', '.join(changes)}; --suggest compiles each")
    if options.search:
        numbers["largest batch per chip"] = _search(config, target)
    programs["decode"] = plan_decode(config, target)
    print(report.listing("decode", programs["decode"], config.data.batch_size, target))
    if options.json:
        numbers |= {name: report.numbers(program, config.data.batch_size, target) for name, program in programs.items()}
        about = {
            "config": options.config,
            "overrides": list(overrides),
            "topology": target.name,
            "compiler": target.compiler,
            "mesh": dict(sharding.make_mesh(config.mesh, target.devices).shape),
            "batch": config.data.batch_size,
        }
        write_bytes(options.json, (json.dumps(about | numbers, indent=2) + "\n").encode())


def _picture(options: argparse.Namespace, config: Config, target: Target) -> None:
    """Plans the decode of one large picture, its rows split over all chips."""
    height, width = images.parse_size("--picture", options.picture)
    one = with_batch(config, 1)
    program = plan_picture(one, target, (height, width))
    print(f"{options.config} on {target.name}: one picture of {width} x {height} px, {config.model.dtype}")
    print(f"compiled with {target.compiler}")
    print(report.listing("decode", program, 1, target))
    if options.json:
        write_bytes(options.json, (json.dumps(report.numbers(program, 1, target), indent=2) + "\n").encode())


def _split_batch(config: Config, target: Target) -> Config:
    """The config, with the next larger batch that splits evenly over the chips if its own does not; says so."""
    multiple = ways(config, target) * config.optimizer.accumulate
    batch = math.ceil(config.data.batch_size / multiple) * multiple
    if batch != config.data.batch_size:
        print(
            f"note: data.batch_size={config.data.batch_size} does not split over {multiple} micro-batches of the "
            f"chips; this plan is for --data.batch_size={batch}"
        )
    return with_batch(config, batch)


def _variants(config: Config, target: Target) -> dict[str, Config]:
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


def _suggest(changes: dict[str, Config], target: Target) -> dict[str, Any]:
    """Compiles the variants and prints which of them fit."""
    result = {}
    for flags, config in changes.items():
        program = plan_step(config, target)
        print(f"  with {flags}: {report.verdict(program, target)}", flush=True)
        result[flags] = report.numbers(program, config.data.batch_size, target)
    return result


def _search(config: Config, target: Target) -> int:
    """Finds and prints the largest batch per chip that fits, keeping everything else."""
    unit = ways(config, target) * config.optimizer.accumulate

    def look(micro_batch: int) -> tuple[float, bool]:
        program = plan_step(with_batch(config, micro_batch * unit), target)
        return program.memory.peak, report.fits(program, target)

    good, bad = largest_fit(look, target.chip.memory, start=config.data.batch_size // unit, budget=SEARCH_BUDGET)
    each = good * config.optimizer.accumulate
    if good == 0:
        print(f"largest batch: none fits, not even {bad} a chip")
    else:
        end = f"{bad * config.optimizer.accumulate} does not" if bad else "more may"
        print(f"largest batch: {each} a chip fits (--data.batch_size={good * unit}); {end}", flush=True)
    return each
