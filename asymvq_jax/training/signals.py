"""Signals that stop a run: SIGTERM, as preempted machines send it, and Ctrl-C."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from asymvq_jax.errors import ExitCode

log = logging.getLogger(__name__)


@contextmanager
def stop_requests() -> Iterator[Callable[[], ExitCode | None]]:
    """Yields a function, to be called before each step, that says on all processes alike whether the run is to stop.

    It returns the exit code of the run that is to stop: SAVED after SIGTERM, INTERRUPTED after Ctrl-C. Before its first
    call, and the second time, Ctrl-C ends the process at once.
    """
    requests: list[ExitCode] = []
    begun = threading.Event()
    several = jax.process_count() > 1

    def terminate(*_: object) -> None:
        requests.append(ExitCode.SAVED)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not begun.is_set() or ExitCode.INTERRUPTED in requests:
            signal.default_int_handler(number, frame)
        requests.append(ExitCode.INTERRUPTED)
        log.info("interrupted: the run ends after this step and saves it; once more ends it at once")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    # Calls are counted from this start: with the step number, a signal before a resumed run's first call would name a
    # call long past.
    calls = itertools.count()

    def ask() -> ExitCode | None:
        begun.set()
        if not several:
            return requests[0] if requests else None
        # jax.distributed catches SIGTERM itself and agrees with all processes on a call to come.
        if not multihost_utils.reached_preemption_sync_point(next(calls)):
            return None
        return ExitCode.INTERRUPTED if requests else ExitCode.SAVED

    handlers: dict[int, Callable[[int, FrameType | None], None]]
    handlers = {signal.SIGINT: interrupt} if several else {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield ask
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
