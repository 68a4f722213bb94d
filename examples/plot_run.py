"""Draws the curves of one run, or of several to compare.

    python examples/plot_run.py runs/base runs/x2 --out curves.png

Reads `metrics.jsonl`, so a run that is still going can be looked at too. Every kind of value that a run has gets a
panel of its own; held-out values are drawn as dots over those of the training. --values l1 lpips chooses panels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

# What is drawn where --values does not say: the losses, how well pixels are preserved, and how the training feels.
VALUES = (
    "l1", "lpips", "nll", "preservation", "generator", "discriminator", "adaptive_weight", "grad_norm",
    "images_per_second", "input_wait_share",
)  # fmt: skip
HELD_OUT = "held_out/"
# Values whose size says little beside their order of magnitude.
LOGARITHMIC = ("nll", "preservation", "adaptive_weight", "grad_norm")

Series = dict[str, tuple[list[int], list[float]]]


def read(run: Path) -> Series:
    """The steps and values of everything that a run has logged, by name."""
    series: Series = defaultdict(lambda: ([], []))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step"}:
            series[name][0].append(record["step"])
            series[name][1].append(record[name])
    return dict(series)


def draw(runs: dict[str, Series], values: list[str]) -> Figure:
    """A panel for each of `values`, and in it a curve for each run."""
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = mpl.color_sequences["tab10"]
    for axis, value in zip(axes, values, strict=False):
        for colour, (run, series) in zip(colours, runs.items(), strict=False):
            if value in series:
                axis.plot(*series[value], color=colour, linewidth=1, label=run)
            if HELD_OUT + value in series:
                steps, held_out = series[HELD_OUT + value]
                axis.plot(steps, held_out, "o", color=colour, markersize=4, label=f"{run}, held out")
        if value in LOGARITHMIC:
            axis.set_yscale("log")
        axis.set_title(value.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    for axis in axes[len(values) :]:
        axis.set_axis_off()
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs")
    parser.add_argument("--out", required=True, type=Path, help="the picture: .png, .svg or .pdf")
    parser.add_argument("--values", nargs="+", help=f"default: those of {', '.join(VALUES)} that there are")
    options = parser.parse_args()
    if missing := [str(run) for run in options.runs if not (run / "metrics.jsonl").is_file()]:
        print(f"error: no metrics.jsonl in {', '.join(missing)}; expected the directory of a run", file=sys.stderr)
        return 2
    runs = {str(run): read(run) for run in options.runs}
    there = {name.removeprefix(HELD_OUT) for series in runs.values() for name in series}
    if not there:
        print("error: nothing is logged there yet", file=sys.stderr)
        return 2
    if unknown := [name for name in options.values or () if name not in there]:
        print(f"error: --values {' '.join(unknown)}: expected some of {', '.join(sorted(there))}", file=sys.stderr)
        return 2
    draw(runs, options.values or [name for name in VALUES if name in there]).savefig(options.out, dpi=110)
    print(f"{options.out}: {len(runs)} run(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
