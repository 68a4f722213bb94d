"""A trace of a few steps, for xprof and TensorBoard's profile page."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from asymvq_jax.files.addresses import in_bucket
from asymvq_jax.files.outputs import write_bytes, writing

log = logging.getLogger(__name__)


class Profile:
    """Traces process 0 while it runs the steps that run.profile_steps names.

    Args:
        steps: "START:END", the steps after START up to END; or "".
        directory: where TensorBoard's events lie.
    """

    def __init__(self, steps: str, directory: epath.Path) -> None:
        self._steps = range(*map(int, steps.split(":"))) if steps and jax.process_index() == 0 else range(0)
        self._directory = directory
        self._kept: tempfile.TemporaryDirectory[str] | None = None
        self._active = False

    def at(self, step: int, state: Any) -> None:
        """Begins or ends the trace.

        Args:
            step: steps done.
            state: is ready when all steps before are done.

        Raises:
            OutputError: the trace cannot be written.
        """
        if self._active == (step in self._steps):
            return
        jax.block_until_ready(state)
        with writing(self._directory):
            if self._active:
                self.close()
            else:
                # The profiler writes to disks only.
                self._kept = tempfile.TemporaryDirectory() if in_bucket(self._directory) else None
                jax.profiler.start_trace(self._kept.name if self._kept else str(self._directory))
                self._active = True

    def close(self) -> None:
        """Ends the trace, if one is under way."""
        if not self._active:
            return
        self._active = False
        jax.profiler.stop_trace()
        if self._kept is not None:
            for file in Path(self._kept.name).rglob("*.*"):
                write_bytes(self._directory / file.relative_to(self._kept.name).as_posix(), file.read_bytes())
            self._kept.cleanup()
        log.info("steps %d to %d are traced: %s", self._steps.start + 1, self._steps.stop, self._directory)
