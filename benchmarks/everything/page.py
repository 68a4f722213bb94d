"""The page: tables of what is known, and what is not."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.everything.cases import OURS, STEPS, Case, Group, Measurement, read

TITLES = {
    "decode": "Decode with a mask",
    "train_step": "Training step, the discriminator taking part",
    "generate": f"Text-to-image: {STEPS} steps with guidance, and the plain decode",
}
HEAD = ("config", "size", "batch", "", "median", "fastest to slowest", "images/s", "TFLOP/s", "MFU",
        "speed to the best of PyTorch", "first run, with compilation", "memory")  # fmt: skip


def write(device: dict[str, Any], everything: list[Group], folder: Path, *, compared: bool) -> str:
    """The page in Markdown.

    Args:
        device: what was found out about the device.
        everything: all that is to be measured.
        folder: where the measurements are kept.
        compared: whether PyTorch is installed.
    """
    known = [m for group in everything for case in group.cases if (m := read(case, folder)) is not None]
    peak, source = device["published"] or device["peak"], "published" if device["published"] else "measured"
    lines = [
        f"# {device['name']}",
        "",
        f"`asymvq benchmark everything`: {device['count']} device(s) of this kind, {device['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in device["versions"].items())
        + f". Computing in {device['dtype']}. Products of {device['side']} x {device['side']} matrices reach "
        f"{device['peak'] / 1e12:.4g} TFLOP/s; MFU is of the {source} {peak / 1e12:.4g}.",
    ]
    if not compared:
        lines += ["", "PyTorch and diffusers are not installed: only ours was measured."]
    elif device["platform"] == "tpu":
        lines += ["", "On TPUs only ours is measured."]
    for subject, title in TITLES.items():
        rows = [m for m in known if m.case.subject == subject]
        if rows:
            lines += ["", f"## {title}", "", *_table(rows, peak)]
    for m in known:
        if m.waiting is not None and m.images_per_second is not None:
            lines += [
                "",
                "## Input",
                "",
                f"A run of {_name(m.case)}, {m.case.batch} x {m.case.size} px, on JPEG files of 500 x 375 px waited "
                f"{m.waiting:.2%} of its time for input, at {m.images_per_second:.4g} images/s.",
            ]
    if reasons := list(_reasons(everything, folder)):
        lines += ["", "## Not measured", "", *reasons]
    return "\n".join(lines) + "\n"


def progress(everything: list[Group], folder: Path) -> str:
    """How much of it is known."""
    found = [read(case, folder) for group in everything for case in group.cases]
    done = sum(m is not None and m.done for m in found)
    left = "" if done == len(found) else "; the same command again goes on"
    return f"{done} of {len(found)} measured{left}"


def _table(rows: Iterable[Measurement], peak: float) -> list[str]:
    rows = list(rows)
    best: dict[tuple[str, int, int], float] = {}
    for m in rows:
        if m.seconds and m.case.contender != OURS:
            key = _key(m.case)
            best[key] = min(best.get(key, float("inf")), statistics.median(m.seconds))
    rows.sort(key=lambda m: (*_key(m.case), m.case.contender != OURS))
    cells = [HEAD, ("---",) * len(HEAD), *(_row(m, best.get(_key(m.case)), peak) for m in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _row(m: Measurement, best: float | None, peak: float) -> tuple[str, ...]:
    case = m.case
    head = (_name(case), str(case.size), str(case.batch), case.contender)
    if not m.seconds:
        return (*head, f"failed: {m.error}" if m.error else f"skipped: {m.skipped}", *[""] * 7)
    median = statistics.median(m.seconds)
    # The others' way may take more or fewer FLOPs.
    speed = m.flops / median if m.flops and case.contender == OURS else None
    return (
        *head,
        f"{1000 * median:.4g} ms",
        f"{1000 * min(m.seconds):.4g} to {1000 * max(m.seconds):.4g}",
        f"{case.batch / median:.4g}",
        f"{speed / 1e12:.4g}" if speed else "",
        f"{speed / peak:.1%}" if speed else "",
        f"{best / median:.2f}" if best else "",
        f"{m.first:.1f} s",
        f"{m.memory / 2**30:.2f} GiB",
    )


def _key(case: Case) -> tuple[str, int, int]:
    return case.config, case.size, case.batch


def _name(case: Case) -> str:
    return Path(case.config).stem or "SD 1.5"


def _reasons(everything: list[Group], folder: Path) -> Iterable[str]:
    for group in everything:
        missing = [case for case in group.cases if read(case, folder) is None]
        if missing:
            shapes = ", ".join(f"{case.batch} x {case.size} px" for case in missing)
            yield f"- {group.name}: {shapes}"
