"""Decodes what several threads ask for, together: the waiting pictures of one size are one batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from asymvq_jax.files.decoding import Array
from asymvq_jax.inference.latents import Layout, understand
from asymvq_jax.inference.whole import decode, encode
from asymvq_jax.models.autoencoder import Autoencoder

# So many sizes of pictures and batches stay compiled.
SIZES = 64


class BusyError(RuntimeError):
    """So many pictures wait already that another one is turned away."""


@dataclass(eq=False)
class Job:
    """One picture to decode.

    Attributes:
        pixels: (h, w, 3) float32 in [-1, 1].
        mask: (h, w, 1) float32, 1 = generate.
        latent: an edited latent of any layout; None: the picture's own.
        layout, scaled: the latent's; see `latents.understand`.
        margin: see `Autoencoder.decode`.
        result: (h, w, 3) float32, when it is done.
    """

    pixels: Array
    mask: Array
    latent: Array | None = None
    layout: Layout | None = None
    scaled: bool | None = None
    margin: int = 0
    result: Future[Array] = field(default_factory=Future)

    def program(self) -> tuple[Any, ...]:
        """Equal for jobs that one program decodes."""
        return self.pixels.shape, self.margin


class Batcher:
    """A thread that decodes, and the queue before it; a context, at whose end all that waits is turned away."""

    def __init__(self, model: Autoencoder, most: int, waiting: int) -> None:
        """Starts nothing yet.

        Args:
            model: an autoencoder.
            most: pictures at once.
            waiting: pictures that may wait.
        """
        self._model, self._most, self._limit = model, most, waiting
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._sizes: set[tuple[int, ...]] = set()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            left = [*self._queue]
            self._queue.clear()
            self._changed.notify_all()
        for job in left:
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(BusyError("the server is being stopped"))
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return len(self._queue)

    def submit(self, job: Job) -> Future[Array]:
        """Puts a picture into the queue.

        Raises:
            BusyError: the queue is full or closed.
        """
        with self._changed:
            if self._closed or len(self._queue) >= self._limit:
                raise BusyError(f"{len(self._queue)} pictures wait already; try again later")
            self._queue.append(job)
            self._changed.notify()
        return job.result

    def _work(self) -> None:
        while jobs := self._next():
            # Who has given up need not be served.
            jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]
            # Whoever waits has to learn of any error, and the thread has to outlive it.
            try:
                if jobs:
                    self._decode(jobs)
            except Exception as error:
                for job in jobs:
                    if not job.result.done():
                        job.result.set_exception(error)

    def _next(self) -> list[Job]:
        """The oldest job and those that fit into its batch; none once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            jobs = [job for job in self._queue if job.program() == self._queue[0].program()][: self._most]
            for job in jobs:
                self._queue.remove(job)
            return jobs

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Sets the results of jobs of one size and margin."""
        config = self._model.config
        count = min(1 << (len(jobs) - 1).bit_length(), self._most)
        size = (count, *jobs[0].pixels.shape)
        if size not in self._sizes and len(self._sizes) >= SIZES:
            self._sizes.clear()
            jax.clear_caches()
        self._sizes.add(size)
        # Full to a power of two, so that few sizes are compiled.
        filled = [*jobs, *[jobs[-1]] * (count - len(jobs))]
        pixels, masks = np.stack([job.pixels for job in filled]), np.stack([job.mask for job in filled])
        own = np.asarray(encode(self._model, pixels))
        latents = own.copy()
        for number, job in enumerate(jobs):
            if job.latent is not None:
                try:
                    latents[number] = self._read(job, own[number])
                except Exception as error:
                    job.result.set_exception(error)
        seen = (pixels, masks) if config.condition else (None, None)
        height, width = pixels.shape[1:3]
        decoded = np.asarray(decode(self._model, latents, *seen, margin=jobs[0].margin))[:, :height, :width]
        for job, result in zip(jobs, decoded, strict=False):
            if not job.result.done():
                job.result.set_result(result)

    def _read(self, job: Job, own: Array) -> Array:
        assert job.latent is not None
        height, width = job.pixels.shape[:2]
        reading = understand(
            job.latent, self._model.config, (height, width), own=lambda: own[None], mask=job.mask,
            layout=job.layout, scaled=job.scaled, norm=self._model.normalization(),
        )  # fmt: skip
        return np.asarray(reading.latent[0])
