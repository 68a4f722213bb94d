"""What is published about accelerators."""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU chip's published figures (cloud.google.com/tpu/docs)."""

    name: str
    # As jax.Device.device_kind has it.
    kind: str
    # Bytes; the runtime keeps a part of it (0.25 GiB on v5e), which only the compiler knows.
    memory: int
    # bfloat16 FLOP/s, and bytes/s between the chip and its memory.
    peak: float
    bandwidth: float
    # Bytes/s that it sends to the others of its slice, all links together, and its share of a pod's network to others.
    ici: float
    dcn: float
    # Topologies to name in an error message; their number of sides is the only one allowed.
    examples: tuple[str, ...]


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
# Sides of a slice of so many chips, where a slice is named by that number (v5e-4).
SQUARE_SIDES = {math.prod(map(int, sides.split("x"))): sides for sides in _SQUARES}
CHIPS = (
    Chip("v5e", "TPU v5 lite", 16 * GIB, 197e12, 819e9, 200e9, 3.125e9, _SQUARES),
    Chip("v5p", "TPU v5", 95 * GIB, 459e12, 2765e9, 600e9, 6.25e9, _CUBES),
    Chip("v6e", "TPU v6 lite", 32 * GIB, 918e12, 1640e9, 400e9, 12.5e9, _SQUARES),
)
# Dense bfloat16 FLOP/s of GPUs, by the beginning of their kind (NVIDIA's data sheets).
GPU_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """A device's bfloat16 FLOP/s by its jax.Device.device_kind; None where nothing is known of it."""
    if (chip := next((c for c in CHIPS if c.kind == kind), None)) is not None:
        return chip.peak
    return next((peak for name, peak in GPU_PEAKS.items() if kind.startswith(name)), None)
