"""asymvq plan table."""

from __future__ import annotations

from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Settings
from asymvq_jax.errors import ConfigError

# 4, 16, 64 and 256 chips of each kind.
TOPOLOGIES = (
    "v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16,v5p:2x2x1,v5p:2x2x4,v5p:4x4x4,v5p:4x8x8,v6e:2x2,v6e:4x4,v6e:8x8,v6e:16x16"
)


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """Plan one configuration for many slices, as a Markdown table; a row is printed as soon as it is compiled."""

    # A published configuration by its name, such as x2, or a Python file that defines get_config().
    config: str
    # Pictures a chip, along data x fsdp.
    per_chip: int = 8
    # The slices, separated by commas; by default 4, 16, 64 and 256 chips of each kind.
    topologies: str = TOPOLOGIES
    settings: Settings


def work(options: PlanTable) -> None:
    """Prints the table."""
    import jax

    from asymvq_jax.plan.chips import open_topology
    from asymvq_jax.plan.compile import ways, with_batch
    from asymvq_jax.plan.table import COLUMNS, row

    jax.config.update("jax_platforms", "cpu")
    if options.per_chip < 1:
        raise ConfigError(f"--per-chip={options.per_chip}: expected at least 1")
    config = options.settings
    targets = [open_topology(name) for name in options.topologies.split(",")]
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        _print(line)
    for target in targets:
        _print(row(with_batch(config, options.per_chip * ways(config, target)), target))


def _print(cells: tuple[str, ...] | list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


main = command("asymvq plan table", PlanTable, work, clock=True)
