"""Trains a model: python train.py --config configs/demo.py [--run.steps=1000 ...]. Starting again resumes."""

import argparse
import logging
import sys

import jax

from asymvq_jax.config import UserError, load_config
from asymvq_jax.training.loop import NonFiniteError, train


def main() -> int:
    """Returns the exit code: 0 done, 1 diverged, 2 bad input, 75 stopped by SIGTERM and saved."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Any field of the config can be set: --group.field=v")
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        config = load_config(arguments.config, overrides)
        _join_cluster()
        return train(config)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _join_cluster() -> None:
    """Joins the other processes of a TPU pod, Slurm or Open MPI job, or of JAX_COORDINATOR_ADDRESS; alone otherwise."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise


if __name__ == "__main__":
    sys.exit(main())
