"""One writer at a time: directories that belong to a single process."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from asymvq_jax.errors import OutputError
from asymvq_jax.files.addresses import in_bucket
from asymvq_jax.files.outputs import writing

log = logging.getLogger(__name__)


@contextmanager
def only_owner(directory: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Holds a lock on a directory that is there; the system lets it go when the process ends, however it ends.

    Buckets (gs://...) and some network file systems have no locks; there nothing is held.

    Args:
        directory: what is to be written by this process alone.
        what: "run" or "build", for the message.

    Raises:
        OutputError: another process holds it.
    """
    if in_bucket(directory):
        yield
        return
    with writing(os.fspath(directory)):
        handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another {what} is writing {os.fspath(directory)}; wait for its end, or choose another directory"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no other %s writes it", directory, error, what)
        yield
    finally:
        os.close(handle)
