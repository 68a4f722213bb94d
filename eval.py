"""Evaluates a model, as `asymvq evaluate` does: python eval.py --config configs/x2.py --checkpoint runs/x2."""

from asymvq_jax.commands.entry import leave
from asymvq_jax.commands.evaluate import main

if __name__ == "__main__":
    leave(main())
