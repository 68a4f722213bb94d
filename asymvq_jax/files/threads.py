"""Other libraries' threads: what they still print once an error has been reported is kept off the screen."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from asymvq_jax.errors import first_line

log = logging.getLogger(__name__)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Inside, an error that is raised is the only thing that is printed of it; after one, threads stay quiet.

    TensorStore's threads report to an event loop that Orbax has closed after the first error, and each prints a
    traceback (orbax 0.12, Nov 2026); Orbax and asyncio log the tracebacks of errors that they raise as well;
    TensorBoard's thread ends with one where its file cannot be written, of which one line is logged here.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    print_unraisable, print_thread_error = sys.unraisablehook, threading.excepthook

    def unraisablehook(failed: sys.UnraisableHookArgs) -> None:
        if not (failed.exc_type is RuntimeError and str(failed.exc_value) == "Event loop is closed"):
            print_unraisable(failed)

    def thread_excepthook(failed: threading.ExceptHookArgs) -> None:
        if type(failed.thread).__module__.startswith("tensorboardX") and failed.exc_value is not None:
            log.warning("TensorBoard's file cannot be written: %s", first_line(failed.exc_value))
        else:
            print_thread_error(failed)

    sys.unraisablehook, threading.excepthook = unraisablehook, thread_excepthook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    # Not after an error, which the threads may hear of later.
    sys.unraisablehook, threading.excepthook = print_unraisable, print_thread_error
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
