"""What is measured, in order of worth, and the form in which it is kept. Imports nothing that touches a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from asymvq_jax.config import Dtype
from asymvq_jax.files.outputs import write_bytes

Subject = Literal["device", "decode", "train_step", "generate", "input"]
SUBJECTS = ("decode", "train_step", "generate", "input")
OURS, EAGER, COMPILED = "ours", "PyTorch eager", "PyTorch compiled"
# Of the sampler in text-to-image.
STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What to measure on."""

    # Published configurations or files, the dearest question first. None: all of them, x2 first; on a CPU, which in
    # minutes can answer for base alone, base first.
    configs: tuple[str, ...] | None
    # Sides of pictures, px, and pictures at once.
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    subjects: tuple[str, ...]
    # None: bfloat16 on accelerators, float32 on a CPU.
    dtype: Dtype | None
    # Whether PyTorch and diffusers are installed.
    torch: bool


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    subject: Subject
    contender: str
    # Empty for text-to-image, whose sizes are Stable Diffusion 1.5's.
    config: str
    size: int
    batch: int

    def file(self, folder: Path) -> Path:
        """Where its measurement is kept."""
        parts = (self.subject, Path(self.config).stem, f"{self.batch}x{self.size}", self.contender)
        return folder / "measurements" / ("-".join(filter(None, parts)).replace(" ", "_") + ".json")


@dataclass(frozen=True)
class Group:
    """Cases that one process measures, one after the other, the smallest first."""

    cases: tuple[Case, ...]
    # The most seconds that its process may take.
    limit: float

    @property
    def name(self) -> str:
        """For people."""
        first = self.cases[0]
        return f"{first.subject} {Path(first.config).stem}".rstrip() + f", {first.contender}"


@dataclass(frozen=True)
class Measurement:
    """What a case came to."""

    case: Case
    # Seconds of each timed run.
    seconds: list[float] = field(default_factory=list)
    # Seconds until the first run was done, with compilation.
    first: float = 0.0
    # Bytes: the most that the process held.
    memory: int = 0
    # Of one run of ours; None where they were not counted.
    flops: float | None = None
    # Of a training run: the share of its time that it waited for input, and pictures a second.
    waiting: float | None = None
    images_per_second: float | None = None
    # Why it failed, and would again; or why it was not tried, which a later call may.
    error: str | None = None
    skipped: str | None = None

    @property
    def done(self) -> bool:
        """Whether a later call need not measure it again."""
        return bool(self.seconds) or self.error is not None or self.waiting is not None

    def write(self, folder: Path) -> None:
        """Keeps it, replacing what was kept of the same case."""
        write_json(self.case.file(folder), dataclasses.asdict(self))


def read(case: Case, folder: Path) -> Measurement | None:
    """What is kept of a case."""
    file = case.file(folder)
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    return Measurement(**{**values, "case": case})


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_bytes(str(file), (json.dumps(values, indent=2) + "\n").encode())


def groups(settings: Settings, platform: str) -> list[Group]:
    """All that is to be measured on a platform ("cpu", "gpu" or "tpu"), in order of worth."""
    by_default = ("base", "x1_5", "x2") if platform == "cpu" else ("x2", "base", "x1_5")
    every = _all(settings, settings.configs or by_default)
    found = [group for group in every if group.cases[0].subject in settings.subjects]
    # PyTorch beside a TPU would be measured on its host's processor.
    compared = settings.torch and platform != "tpu"
    return [group for group in found if compared or group.cases[0].contender == OURS]


def _all(settings: Settings, configs: tuple[str, ...]) -> Iterator[Group]:
    first, *others = configs
    side, batch = min(settings.sizes), max(settings.batches)

    def decode(config: str, contender: str, limit: float) -> Group:
        shapes = sorted((b * s * s, s, b) for s in settings.sizes for b in settings.batches)
        return Group(tuple(Case("decode", contender, config, s, b) for _, s, b in shapes), limit)

    def step(config: str, contender: str, limit: float) -> Group:
        return Group((Case("train_step", contender, config, side, batch),), limit)

    def generate(contender: str, limit: float) -> Group:
        cases = (Case("generate", contender, "", max(settings.sizes), b) for b in sorted(settings.batches))
        return Group(tuple(cases), limit)

    yield decode(first, OURS, 90)
    yield step(first, OURS, 120)
    yield decode(first, EAGER, 45)
    yield step(first, EAGER, 45)
    yield Group((Case("input", OURS, first, side, batch),), 75)
    yield decode(first, COMPILED, 90)
    yield step(first, COMPILED, 120)
    yield generate(OURS, 75)
    yield generate(EAGER, 60)
    for config in others:
        yield decode(config, OURS, 75)
        yield decode(config, EAGER, 30)
    for config in others[:1]:
        yield step(config, OURS, 90)
        yield step(config, EAGER, 30)
        yield step(config, COMPILED, 90)
    yield generate(COMPILED, 90)
    for config in others:
        yield decode(config, COMPILED, 75)
