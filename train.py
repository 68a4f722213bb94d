"""Trains a model: python train.py --config configs/demo.py [--run.steps=1000 ...]. Starting again resumes.

On several hosts, start it on each: TPU pods, Slurm and Open MPI are recognised; elsewhere set JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0) for each process.
"""

import argparse
import logging
import os
import sys
import threading

import jax

from asymvq_jax.compilation import keep_compiled_programs
from asymvq_jax.config import ConfigError, UserError, load_config
from asymvq_jax.training.loop import EXIT_LOST_PEER, LostPeerError, NonFiniteError, train

EXIT_CODES = {NonFiniteError: 1, UserError: 2, LostPeerError: EXIT_LOST_PEER}
# A process that has sent no sign of life for so long is taken for dead, and the others end: longer than a machine that
# is short of memory or being migrated stalls.
HEARTBEAT_TIMEOUT = 60
# At the end the others wait so long for process 0, which completes the last checkpoint.
SHUTDOWN_TIMEOUT = 300


def main() -> int:
    """Returns the exit code.

    0 done, 1 diverged, 2 bad input or a place that cannot be written to, 75 stopped by SIGTERM and saved, 76 another
    process has ended (134 where JAX notices that first, and aborts with a message of its own).
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any field of the config can be set: --group.field=v",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("jax").setLevel(logging.WARNING)
    # Orbax and its event loop log the traceback of a failed write, and raise the error as well.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        config = load_config(arguments.config, overrides)
        keep_compiled_programs()
        _join_cluster()
        return train(config)
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    if jax.distributed.is_initialized():
        _leave_cluster(code)
    return code


def _join_cluster() -> None:
    """Joins the other processes of the run; alone where there are none.

    Raises:
        ConfigError: the environment names other processes, but not all that it takes to find them.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    told = {name: os.environ[name] for name in names if name in os.environ}
    explicit = {}
    try:
        if len(told) == len(names):
            # JAX itself reads the address only.
            explicit = {"num_processes": int(told[names[1]]), "process_id": int(told[names[2]])}
            explicit["cluster_detection_method"] = "deactivate"
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT, **explicit
        )
    except ValueError as error:
        if told:
            raise ConfigError(f"cannot find the other processes: {error} Set {', '.join(names)}; got {told}") from None
        if "coordinator_address" not in str(error):
            raise


def _leave_cluster(code: int) -> None:
    """Ends this process after an error, without waiting for processes that may go on or be gone."""
    sys.stderr.flush()
    # Where all of them met the same error, none is to be aborted by JAX because another was quicker to end.
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(10)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
