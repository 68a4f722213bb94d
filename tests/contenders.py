"""Contenders of a contest that only count: a module of their own, so that their processes import nothing else."""

import numpy as np

from benchmarks import contest


def count(step: float) -> contest.Run:
    """Each run returns [0, the sum of all runs' steps]."""
    calls = []

    def run():
        calls.append(step)
        return lambda: np.array([0.0, sum(calls)])

    return run


def fail(message: str) -> contest.Run:
    """One that cannot be prepared."""
    raise ValueError(message)
