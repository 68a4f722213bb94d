"""asymvq train."""

from __future__ import annotations

from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Settings


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model. The same command again resumes the run in run.directory.

    On several hosts, start it on each: TPU pods, Slurm and Open MPI are recognised; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0) for each process.

    Exit codes: 0 done, 1 diverged, 2 wrong input, 75 asked to stop and saved, 76 another process has ended (134 where
    JAX notices that first, and aborts with a message of its own), 130 interrupted and saved.
    """

    # A published configuration by its name: base, x1_5, x2, sdxl_x2, sd3_x2, flux_x2, flux2_x2, qwen_image_x2, wan_x2,
    # vq_f8_x2, ... (configs/ has all; demo needs neither pictures nor weights), or a Python file that defines
    # get_config().
    config: str
    settings: Settings


def work(options: Train) -> int:
    """Trains; returns the exit code."""
    from asymvq_jax.devices import cluster
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.training.loop import train

    keep_compiled_programs()
    cluster.join()
    return train(options.settings)


main = command("asymvq train", Train, work, clock=True)
