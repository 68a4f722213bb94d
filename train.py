"""Trains a model, as `asymvq train` does: python train.py --config configs/demo.py [--run.steps=1000 ...]."""

from asymvq_jax.commands.entry import leave
from asymvq_jax.commands.train import main

if __name__ == "__main__":
    leave(main())
