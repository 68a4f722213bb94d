"""Where a run's time goes: by what it was spent on, over all of its starts, and step by step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

# What a run's time is spent on. lost: steps that were done again after a restart; compile: the first call of a program.
Kind = Literal["start", "restore", "compile", "steps", "input", "evaluate", "save", "lost"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Lap(NamedTuple):
    """What was done since the lap before, and the elapsed time."""

    steps_per_second: float
    # Share of the time in which the step waited for input.
    waiting: float
    total: float


class Clock:
    """Charges every second to one kind; a new one charges to "start"."""

    def __init__(self) -> None:
        self.spent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._kind: Kind = "start"
        self._mark = time.perf_counter()
        self._lap = (0.0, 0.0)

    def continues(self, spent: Mapping[str, float]) -> None:
        """Adds what the run's earlier starts have spent."""
        for kind in KINDS:
            self.spent[kind] += float(spent.get(kind, 0.0))

    def begin(self) -> None:
        """From here on time is charged to "steps", and the first lap begins."""
        self._charge("steps")
        self._lap = self._under_way()

    @contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """Charges the time inside to `kind`."""
        outer = self._kind
        self._charge(kind)
        try:
            yield
        finally:
            self._charge(outer)

    def _charge(self, following: Kind) -> None:
        now = time.perf_counter()
        self.spent[self._kind] += now - self._mark
        self._kind, self._mark = following, now

    def _under_way(self) -> tuple[float, float]:
        """Seconds of steps, and of these waiting for input; evaluation and checkpoints are left out."""
        return sum(self.spent[kind] for kind in ("steps", "input", "compile")), self.spent["input"]

    @property
    def total(self) -> float:
        """Seconds of all starts together, without the time between them."""
        self._charge(self._kind)
        return sum(self.spent.values())

    @property
    def goodput(self) -> float:
        """The share of the total that was spent in steps which count."""
        return self.spent["steps"] / max(self.total, 1e-9)

    def lap(self, steps: int) -> Lap:
        """Ends a lap of so many steps."""
        total = self.total
        before, self._lap = self._lap, self._under_way()
        spent, waited = (now - then for now, then in zip(self._lap, before, strict=True))
        spent = max(spent, 1e-9)
        return Lap(steps / spent, waited / spent, total)


class StepTimes:
    """How long each step took on the devices, seen by a thread that waits for the results."""

    def __init__(self) -> None:
        # None is a pause.
        self._results: queue.Queue[Any] = queue.Queue()
        self._times: list[float] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def add(self, result: Any) -> None:
        """Takes note of a step's result, which need not be there yet; None where something else follows."""
        self._results.put(result)

    def take(self) -> dict[str, float]:
        """Median, 95th percentile and most of the steps since the last time, s; empty where there were none."""
        self._results.join()
        times, self._times = self._times, []
        if not times:
            return {}
        median, high = np.percentile(times, (50, 95))
        return {"p50": float(median), "p95": float(high), "max": max(times)}

    def close(self) -> None:
        """Ends the thread."""
        self._results.put(StopIteration)

    def _watch(self) -> None:
        last: float | None = None
        while (result := self._results.get()) is not StopIteration:
            try:
                jax.block_until_ready(result)
            except jax.errors.JaxRuntimeError:
                # The loop meets the same error.
                result = None
            now = time.perf_counter()
            if result is not None and last is not None:
                self._times.append(now - last)
            last = None if result is None else now
            self._results.task_done()
