"""What a run reports: a progress bar with ETA, metrics in TensorBoard and metrics.jsonl, picture grids."""

from __future__ import annotations

import json
import logging
import math
import sys

import numpy as np
from etils import epath
from tqdm import tqdm

from asymvq_jax.files import images
from asymvq_jax.files.addresses import in_bucket
from asymvq_jax.files.outputs import write_bytes, writing
from asymvq_jax.training.board import Board

log = logging.getLogger(__name__)


class RunLog:
    """Writes on one process only; on all others every method does nothing."""

    def __init__(self, directory: epath.Path, *, step: int, steps: int, active: bool) -> None:
        self.active = active
        # The run's time when an earlier start logged its last line, s.
        self.last_seconds = 0.0
        if not active:
            return
        self._directory = directory
        self._file = directory / "metrics.jsonl"
        with writing(self._file):
            lines = self._file.read_bytes().splitlines() if self._file.exists() else []
        done = [_step(line) for line in lines]
        self.last_seconds = max((_seconds(line) for line in lines), default=0.0)
        # A run that was killed has logged steps beyond its last checkpoint, which are about to be done again.
        self._lines = [line.decode() for line, at in zip(lines, done, strict=True) if at is not None and at <= step]
        # The last line of a killed run may be cut off; any other has been damaged since.
        if damaged := sum(at is None for at in done[:-1]):
            log.warning("%s: %d damaged lines are left out", self._file, damaged)
        self._board = Board(directory / "tensorboard", first_step=step + 1)
        self.flush()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float], note: str) -> None:
        """Records scalars and prints them as one line after `note`."""
        if not self.active:
            return
        # JSON has no number that is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append(json.dumps({"step": step, **finite}, allow_nan=False))
        if not in_bucket(self._file):
            with writing(self._file), self._file.open("a") as file:
                file.write(self._lines[-1] + "\n")
        for name, value in finite.items():
            if value is not None:
                self._board.scalar(name, value, step)
        with tqdm.external_write_mode():
            log.info("%s", note)

    def picture(self, step: int, grid: np.ndarray) -> None:
        """Writes a picture grid, (h, w, 3) uint8."""
        if self.active:
            images.write(self._directory / "pictures" / f"{step:08d}.png", grid)
            self._board.picture("pictures", grid, step)

    def flush(self) -> None:
        """Brings metrics.jsonl up to date, and TensorBoard's events in a bucket, where no file can be appended to."""
        if self.active:
            self._board.flush()
            write_bytes(self._file, "".join(line + "\n" for line in self._lines).encode())

    def close(self) -> None:
        """Ends the bar and the files."""
        if self.active:
            self._bar.close()
            self.flush()


def _step(line: bytes) -> int | None:
    """The step that a line is of; None where the line is damaged."""
    try:
        record = json.loads(line.decode(), parse_constant=_refuse)
        step = record["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _seconds(line: bytes) -> float:
    try:
        seconds = json.loads(line.decode())["seconds"]
    except (ValueError, KeyError, TypeError):
        return 0.0
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
