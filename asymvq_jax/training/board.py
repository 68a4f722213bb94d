"""TensorBoard's event file, written event by event on the caller's thread, so that its errors end nowhere else."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from asymvq_jax.errors import UnansweredError, first_line
from asymvq_jax.files.addresses import bucket_errors, in_bucket

# tensorboardX imports these where they are installed, for graphs and buckets that it does not write here: more than
# half of the time that a start takes to import everything. A module that is None counts as one that is not installed.
_hidden = {"torch", "boto3", "google.cloud.storage"} - sys.modules.keys()
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]
try:
    from tensorboardX import summary
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto import event_pb2
finally:
    for _name in _hidden:
        del sys.modules[_name]

log = logging.getLogger(__name__)

VERSION = "brain.Event:2"


class Board:
    """Appends scalars and pictures to one new event file.

    metrics.jsonl holds the same figures and ends a run that cannot write it; where the board cannot be written,
    one warning is logged and the run goes on without it.

    Args:
        directory: where TensorBoard looks; made if it is not there.
        first_step: events of earlier files from this step on are to be forgotten.
    """

    def __init__(self, directory: epath.Path, *, first_step: int) -> None:
        self._name = str(directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        # Object stores cannot append: there each flush writes what is new as a file of its own.
        self._new: bytearray | None = bytearray() if in_bucket(directory) else None
        self._part = 0
        self._lost = False
        with self._giving_up():
            directory.mkdir(parents=True, exist_ok=True)
        self._add(file_version=VERSION)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.START)
        self._add(step=first_step, session_log=start)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(step=step, summary=summary.scalar(name, value))

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Adds a picture, (h, w, 3) uint8."""
        self._add(step=step, summary=summary.image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        """Writes what is new to an object store; other files are up to date."""
        if self._new and not self._lost:
            with self._giving_up():
                epath.Path(f"{self._name}.{self._part:06d}").write_bytes(bytes(self._new))
            self._part += 1
            self._new.clear()
            self._add(file_version=VERSION)

    def _add(self, **content: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + _checksum(length) + data + _checksum(data)
        if self._new is not None:
            self._new += record
        elif not self._lost:
            with self._giving_up(), open(self._name, "ab") as file:
                file.write(record)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            with bucket_errors(self._name):
                yield
        except (OSError, UnansweredError) as error:
            log.warning("TensorBoard's file cannot be written, and is left as it is: %s", first_line(error))
            self._lost = True


def _checksum(data: bytes) -> bytes:
    """As the format of TensorFlow's records masks it."""
    plain = crc32c(data)
    return struct.pack("<I", ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF)
