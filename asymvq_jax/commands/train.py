"""Trains a model: python train.py --config configs/demo.py [--run.steps=1000 ...]. Starting again resumes.

On several hosts, start it on each: TPU pods, Slurm and Open MPI are recognised; elsewhere set JAX_COORDINATOR_ADDRESS
(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0) for each process.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import jax

from asymvq_jax.config import load_config
from asymvq_jax.devices import cluster
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.errors import LostPeerError, NonFiniteError, UserError
from asymvq_jax.training.loop import EXIT_LOST_PEER, train

EXIT_CODES = {NonFiniteError: 1, UserError: 2, LostPeerError: EXIT_LOST_PEER}


def main(arguments: Sequence[str] | None = None) -> int:
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
    options, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("jax").setLevel(logging.WARNING)
    # Orbax and its event loop log the traceback of a failed write, and raise the error as well.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        config = load_config(options.config, overrides)
        keep_compiled_programs()
        cluster.join()
        return train(config)
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    if jax.distributed.is_initialized():
        cluster.leave(code)
    return code
