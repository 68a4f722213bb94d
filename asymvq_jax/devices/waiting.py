"""Waiting for the other processes, and for what is being written, with a limit: it is said who is missing or failed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax

from asymvq_jax.devices import cluster
from asymvq_jax.errors import ExitCode, LostPeerError, exit_code, first_line

log = logging.getLogger(__name__)

# Seconds between two lines about a wait, and least parts of the limit in which there is one.
INTERVAL, PARTS = 30.0, 4
# Where each process notes in JAX's coordination service, which process 0 keeps, how far it is.
NOTES = "asymvq/waiting"
# Where a process notes there that it has failed, and with which exit code.
FAILURES = "asymvq/failed"
# Seconds between two looks for such a note, and seconds for what fails in all processes to end this one by itself: both
# together are less than a process that has failed stays, see `cluster.leave`.
LOOK, GRACE = 2.0, 3.0


class _At(NamedTuple):
    """How far a process is: how many waits it has begun, the last one, and when (None: that has ended)."""

    number: int
    what: str
    since: float | None


class Watch:
    """Ends this process, with LOST_PEER, where a wait takes longer than a limit; a context manager.

    An error raised inside is sent to the other processes, which end within seconds; without it they would wait for the
    limit.

    Args:
        limit: seconds.
        advice: what the message ends with.
        leave: ends the process; another thread than the one that waits calls it.
    """

    def __init__(self, limit: float, advice: str, leave: Callable[[int], Any] = os._exit) -> None:
        self._limit, self._advice, self._leave = limit, advice, leave
        self._interval = min(INTERVAL, limit / PARTS)
        self._at = _At(0, "the start", None)
        self._closed, self._fails = threading.Event(), threading.Event()
        self._client = _client()
        # How far the others were when the service answered last, and when that was.
        self._others: dict[int, _At] = {}
        self._answered = time.monotonic()

    def __enter__(self) -> Watch:
        for work in (self._look, self._exchange, self._listen) if self._client is not None else (self._look,):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._closed.set()
        self._fails.set()
        lost = (jax.errors.JaxRuntimeError, LostPeerError)
        if self._client is not None and isinstance(error, Exception) and not isinstance(error, lost):
            # In a thread, for the service may be gone.
            telling = threading.Thread(target=self._tell, args=(error,), daemon=True)
            telling.start()
            telling.join(GRACE)

    def fails(self) -> None:
        """From here on this process ends with an error of its own, and another's does not end it before."""
        self._fails.set()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Limits the time inside. All processes come by the same waits in the same order.

        Args:
            what: is waited for, for messages.
        """
        self._at = _At(self._at.number + 1, what, time.monotonic())
        try:
            yield
        finally:
            self._at = self._at._replace(since=None)

    def _look(self) -> None:
        while not self._closed.wait(self._interval):
            at, now = self._at, time.monotonic()
            if at.since is None or now - at.since < self._interval:
                continue
            text = f"waiting for {at.what} since {now - at.since:.0f} s"
            if who := self._missing(at.number):
                text += f": {who}"
            if now - at.since < self._limit:
                log.warning("%s; the run ends after %.0f s", text, self._limit)
                continue
            print(f"error: {text}, longer than run.wait_limit={self._limit:g}; {self._advice}", file=sys.stderr)
            sys.stderr.flush()
            self._leave(ExitCode.LOST_PEER)

    def _missing(self, count: int) -> str:
        """Which processes are not as far as this one, and what they said last."""
        if self._client is None:
            return ""
        if time.monotonic() - self._answered > 3 * self._interval:
            return "process 0, through which the processes know of each other, does not answer"
        behind = []
        for index in range(jax.process_count()):
            if index == jax.process_index():
                continue
            other = self._others.get(index)
            if other is None or other.number < count:
                last = "before its first wait" if other is None else f"last at {other.what}"
                behind.append(f"process {index} has not arrived ({last})")
        return "; ".join(behind)

    def _exchange(self) -> None:
        while not self._closed.is_set():
            at = self._at
            try:
                self._client.key_value_set(
                    f"{NOTES}/{jax.process_index()}", f"{at.number} {at.what}", allow_overwrite=True
                )
                for key, value in self._client.key_value_dir_get(NOTES):
                    count, _, what = value.partition(" ")
                    self._others[int(key.rpartition("/")[2])] = _At(int(count), what, None)
                self._answered = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                log.debug("the coordination service does not answer: %s", error)
            self._closed.wait(self._interval / 2)

    def _tell(self, error: Exception) -> None:
        # `train` makes OutputErrors of these two.
        code = ExitCode.WRONG_INPUT if isinstance(error, (OSError, ImportError)) else exit_code(error)
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{FAILURES}/{jax.process_index()}", f"{code:d} {first_line(error)}")

    def _listen(self) -> None:
        while not self._fails.wait(LOOK):
            try:
                failed = self._client.key_value_dir_get(FAILURES)
            except jax.errors.JaxRuntimeError as error:
                log.debug("the coordination service does not answer: %s", error)
                continue
            if failed and not self._fails.wait(GRACE):
                key, (code, _, text) = failed[0][0], failed[0][1].partition(" ")
                print(f"error: process {key.rpartition('/')[2]} has failed: {text}", file=sys.stderr)
                # Together with that process: JAX aborts those that process 0 leaves behind.
                cluster.leave(int(code))
                self._leave(int(code))
                return


def _client() -> Any:
    """JAX's coordination service; None where this is the only process. JAX has no public name for it."""
    from jax._src.distributed import global_state

    return global_state.client if jax.process_count() > 1 else None
