"""asymvq plan."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Settings, flatten
from asymvq_jax.errors import UserError

if TYPE_CHECKING:
    from asymvq_jax.plan.chips import Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan a run: compile the training step and the decode for chips that need not be present, and print the needs.

    `asymvq plan table` plans one configuration for many slices, `asymvq plan denoising` Stable Diffusion's own loop.
    """

    # A published configuration by its name, such as x2, or a Python file that defines get_config().
    config: str
    # A slice by its sides, such as v5e:16x16 or v5p:4x4x4, or by its chips, such as v5e-256 or v5litepod-4; local: the
    # devices present.
    topology: str = "local"
    # If the run does not fit, compile variants that may.
    suggest: bool = False
    # Find the largest batch that fits; implies --suggest.
    search: bool = False
    # Plan only the decode of one picture of HEIGHTxWIDTH px over all chips.
    picture: str | None = None
    # Compile for a TPU as a run does, which takes ten times as long.
    thorough: bool = False
    # Dollars, or any money, for an hour of one chip: says what the run's run.steps take at least.
    price: float | None = None
    # Write the numbers to this .json file.
    json: str | None = None
    settings: Settings


def work(options: Plan) -> None:
    """Compiles, prints what one chip needs, and writes the numbers; returns also where the run does not fit."""
    import jax

    from asymvq_jax.files.outputs import check_writable, write_bytes
    from asymvq_jax.plan.chips import open_topology

    if options.json:
        check_writable(options.json, (".json",))
    if options.price is not None and (options.price < 0 or options.picture):
        raise UserError(f"--price {options.price}: expected zero or more, and no --picture")
    if options.topology != "local":
        # The devices present are not needed; a TPU among them stays free for others.
        jax.config.update("jax_platforms", "cpu")
    target = open_topology(options.topology, thorough=options.thorough)
    if options.search and target.chip is None:
        kind = target.devices[0].device_kind
        raise UserError(f"--search: the memory of {kind} is not known; name a chip's with --topology")
    if options.price is not None and target.chip is None:
        kind = target.devices[0].device_kind
        raise UserError(f"--price: the speed of {kind} is not known; name a chip's with --topology")
    numbers = _picture(options, options.picture, target) if options.picture else _run(options, target)
    if options.json:
        write_bytes(options.json, (json.dumps(numbers, indent=2) + "\n").encode())


def _run(options: Plan, target: Target) -> dict[str, Any]:
    """Plans the training step and the decode; returns the numbers."""
    from asymvq_jax.devices import sharding
    from asymvq_jax.plan import advice, compile, report

    config = advice.split_batch(options.settings, target)
    batch = config.data.batch_size
    print(report.heading(config, target, options.config))
    programs = {"train step": compile.plan_step(config, target)}
    print(report.listing("train step", programs["train step"], batch, target), flush=True)
    cost = None
    if options.price is not None:
        cost = report.cost(programs["train step"], config, target, options.price)
        print(cost.describe() if cost else "  no cost: the step does not fit")
    numbers: dict[str, Any] = {
        "config": options.config,
        "settings": flatten(config),
        "topology": target.name,
        "compiler": target.compiler,
        "mesh": dict(sharding.make_mesh(config.mesh, target.devices).shape),
        "batch": batch,
    }
    if cost is not None:
        numbers["cost"] = dataclasses.asdict(cost)
    if not report.fits(programs["train step"], target):
        changes = advice.variants(config, target)
        if options.suggest or options.search:
            numbers["variants"] = advice.suggest(changes, target)
        else:
            print(f"  to try: {', '.join(changes)}; --suggest compiles each")
    if options.search:
        numbers["largest batch per chip"] = advice.search(config, target)
    programs["decode"] = compile.plan_decode(config, target)
    print(report.listing("decode", programs["decode"], batch, target))
    return numbers | {name: report.numbers(program, batch, target) for name, program in programs.items()}


def _picture(options: Plan, size: str, target: Target) -> dict[str, Any]:
    """Plans the decode of one large picture, its rows split over all chips; returns the numbers."""
    from asymvq_jax.files import images
    from asymvq_jax.plan import compile, report

    height, width = images.parse_size("--picture", size)
    config = compile.with_batch(options.settings, 1)
    program = compile.plan_picture(config, target, (height, width))
    print(f"{options.config} on {target.name}: one picture of {width} x {height} px, {config.model.dtype}")
    print(f"compiled with {target.compiler}")
    print(report.listing("decode", program, 1, target))
    return report.numbers(program, 1, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["table"]:
        from asymvq_jax.commands.plan_table import main as table

        return table(words[1:])
    if words[:1] == ["denoising"]:
        from asymvq_jax.commands.plan_denoising import main as denoising

        return denoising(words[1:])
    return command("asymvq plan", Plan, work, clock=True)(words)
