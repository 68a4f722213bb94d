"""The other processes of a command that is started on several hosts: finding and leaving them."""

from __future__ import annotations

import os
import sys
import threading

import jax

from asymvq_jax.config import ConfigError

# A process that has sent no sign of life for so long is taken for dead, and the others end: longer than a machine that
# is short of memory or being migrated stalls.
HEARTBEAT_TIMEOUT = 60
# At the end the others wait so long for process 0, which completes the last checkpoint.
SHUTDOWN_TIMEOUT = 300
# Where each has its own work, for the slowest: process 0 must not end before it.
INDEPENDENT_TIMEOUT = 7 * 24 * 3600


def join(*, independent: bool = False) -> None:
    """Joins the other processes; alone where there are none.

    TPU pods, Slurm and Open MPI are recognised; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

    Args:
        independent: the processes have nothing to tell each other: they end at different times, and SIGTERM ends one
            at once.

    Raises:
        ConfigError: the environment names other processes, but not all that it takes to find them.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    told = {name: os.environ[name] for name in names if name in os.environ}
    explicit = {}
    if independent:
        # Otherwise it catches SIGTERM, and tells the others.
        jax.config.update("jax_enable_preemption_service", False)
    try:
        if len(told) == len(names):
            # JAX itself reads the address only.
            explicit = {"num_processes": int(told[names[1]]), "process_id": int(told[names[2]])}
            explicit["cluster_detection_method"] = "deactivate"
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=INDEPENDENT_TIMEOUT if independent else SHUTDOWN_TIMEOUT,
            **explicit,
        )
    except ValueError as error:
        if told:
            raise ConfigError(f"cannot find the other processes: {error} Set {', '.join(names)}; got {told}") from None
        if "coordinator_address" not in str(error):
            raise


def leave(code: int) -> None:
    """Ends this process after an error, without waiting for processes that may go on or be gone."""
    sys.stderr.flush()
    # Where all of them met the same error, none is to be aborted by JAX because another was quicker to end.
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(10)
    os._exit(code)
