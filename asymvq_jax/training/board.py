"""TensorBoard's event file, written event by event on the caller's thread, so that its errors end nowhere else."""

from __future__ import annotations

import logging
import socket
import struct
import time
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from asymvq_jax.errors import first_line

log = logging.getLogger(__name__)


class Board:
    """Appends scalars and pictures to one new event file.

    metrics.jsonl holds the same figures and ends a run that cannot write it; a board that cannot be written is told
    once and left.

    Args:
        directory: where TensorBoard looks; made if it is not there.
        first_step: events of earlier files from this step on are to be forgotten.
    """

    def __init__(self, directory: epath.Path, *, first_step: int) -> None:
        self._file: epath.Path | None = directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        # Object stores cannot append: there the file is kept here, and written whole.
        self._whole: bytearray | None = bytearray() if "://" in str(directory) else None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.START)
        self._add(step=first_step, session_log=start)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(step=step, summary=summary.scalar(name, value))

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Adds a picture, (h, w, 3) uint8."""
        self._add(step=step, summary=summary.image(name, picture, dataformats="HWC"))

    def flush(self) -> None:
        """Brings the file in an object store up to date; others are."""
        if self._file is not None and self._whole is not None:
            try:
                self._file.write_bytes(bytes(self._whole))
            except OSError as error:
                self._give_up(error)

    def _add(self, **content: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + _checksum(length) + data + _checksum(data)
        if self._whole is not None:
            self._whole += record
        elif self._file is not None:
            try:
                with self._file.open("ab") as file:
                    file.write(record)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("TensorBoard's file cannot be written, and is left as it is: %s", first_line(error))
        self._file = self._whole = None


def _checksum(data: bytes) -> bytes:
    """As the format of TensorFlow's records masks it."""
    plain = crc32c(data)
    return struct.pack("<I", ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF)
