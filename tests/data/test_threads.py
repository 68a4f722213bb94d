"""How many batches are read at once."""

import threading

import numpy as np
import pytest

from asymvq_jax.config import DataConfig
from asymvq_jax.data.pipeline import Inputs, training_batches


class Together:
    """A source whose pictures can be read by so many threads at once only."""

    def __init__(self, threads: int) -> None:
        self._barrier = threading.Barrier(threads)

    def __len__(self) -> int:
        return 64

    def read(self, index: int) -> np.ndarray:
        self._barrier.wait(60)
        return np.full((8, 8, 3), index, np.uint8)


def _first(source: Together, **changes) -> list[int]:
    data = DataConfig(source="folder", image_size=8, batch_size=1, prefetch=1, **changes)
    batches = training_batches(data, 0, process_index=0, process_count=1, inputs=Inputs(source, source, ()))
    return [int(next(batches)["image"][0, 0, 0, 0]) for _ in range(5)]


@pytest.mark.parametrize(
    ("threads", "path", "expected"), [(0, "photos", 4), (0, "gs://bucket/photos", 16), (11, "photos", 11)]
)
def test_batches_are_read_by_so_many_threads_and_do_not_depend_on_them(threads, path, expected):
    assert _first(Together(expected), path=path, threads=threads) == _first(Together(1), path="photos", threads=1)
