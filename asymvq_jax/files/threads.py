"""Other libraries' threads: what they still print once an error has been reported is kept off the screen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Inside, an error that is raised is the only thing that is printed of it; after one, threads stay quiet.

    TensorStore's threads report to an event loop that Orbax has closed after the first error, and each prints a
    traceback (orbax 0.12, Nov 2026); Orbax and asyncio log the tracebacks of errors that they raise as well.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    print_unraisable = sys.unraisablehook

    def unraisablehook(failed: sys.UnraisableHookArgs) -> None:
        if not (failed.exc_type is RuntimeError and str(failed.exc_value) == "Event loop is closed"):
            print_unraisable(failed)

    sys.unraisablehook = unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    # Not after an error, which the threads may hear of later.
    sys.unraisablehook = print_unraisable
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
