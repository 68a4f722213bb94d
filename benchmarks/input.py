"""Measures the input pipeline: asymvq benchmark input [--workers 0,1,2 --seconds 20].

Over JPEG files of ImageNet's usual size, made from the photographs that the packages ship, and over the same files as
an ArrayRecord data set: reading, decoding, random crop to 256 px, LaMa's masks. Prints the pictures a second, which a
pod's host needs its chips' images/s of, and how many the time of one core pays for.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2

from asymvq_jax.commands.entry import command
from asymvq_jax.config import DataConfig
from asymvq_jax.data.build import build
from asymvq_jax.data.pipeline import training_batches
from asymvq_jax.data.sources import open_source
from asymvq_jax.files import images
from benchmarks import contest

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


def work(options: Input) -> None:
    """Measures, and prints a table."""
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


def write_files(folder: Path) -> None:
    """JPEG files of ImageNet's usual size, made from the photographs that the packages ship."""
    photos = open_source(DataConfig(source="photos"), train=True)
    for i in range(FILES):
        picture = cv2.resize(photos.read(i % len(photos)), SIZE, interpolation=cv2.INTER_AREA)
        images.write(str(folder / f"{i}.jpg"), picture)


def _measure(data: DataConfig, seconds: float) -> tuple[float, float]:
    """Pictures by the second of the clock, and by the second that a core worked for them."""
    batches = training_batches(data, seed=0, process_index=0, process_count=1)
    # The workers have started, and their buffers are full, once some batches have come.
    for _ in range(2 * data.prefetch * max(data.workers, 1)):
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
