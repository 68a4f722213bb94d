"""Trains a model: python train.py --config configs/demo.py [--run.steps=1000 ...], as `asymvq train` does."""

import sys

from asymvq_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
