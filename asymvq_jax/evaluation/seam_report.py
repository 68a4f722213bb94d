"""What `measure_seam` measured, over all pictures: means, the worst, intervals against one row; tables and a plot."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from asymvq_jax.evaluation.protocols import NATURAL, PROTOCOLS
from asymvq_jax.evaluation.rows import markdown
from asymvq_jax.evaluation.seam import COLUMNS, Measured
from asymvq_jax.files.outputs import write_bytes

# What a way is chosen by: whether the edge shows, and whether the fill has the colours that it was given.
GOALS = ("step", "tone")
TOGETHER = "the four natural protocols"
RESAMPLES, CONFIDENCE = 2000, 95
# Of the plot's points, by the first word of the row; the others are grey.
COLOURS = {"ours": "tab:orange", "harmonised": "tab:red"}

Numbers = dict[str, float]
Rows = dict[str, dict[str, Numbers]]


def summarise(measured: Sequence[Measured], against: str) -> dict[str, Rows]:
    """By protocol, and over the natural ones together: by row and by metric, its numbers.

    Args:
        measured: from `measure_seam`.
        against: the row that all others are compared with; see `asymvq_jax.evaluation.seam.check_row`.

    Returns:
        mean; p95, the 95th percentile over the cases; difference, the mean difference to the row `against`; low and
        high, the ends of its 95 % interval by bootstrap over the pictures, with all cases of a picture together.
    """
    names = list(dict.fromkeys(m.row for m in measured))
    groups = {protocol: (protocol,) for protocol in PROTOCOLS} | {TOGETHER: NATURAL}
    result: dict[str, Rows] = {}
    for group, protocols in groups.items():
        chosen = [m for m in measured if m.protocol in protocols]
        base = {_case(m): m.values for m in chosen if m.row == against}
        result[group] = {row: _row([m for m in chosen if m.row == row], base) for row in names} if base else {}
    return {group: rows for group, rows in result.items() if rows}


def _case(measured: Measured) -> tuple[str, str, str]:
    return measured.picture, measured.kind, measured.protocol


def _row(measured: Sequence[Measured], base: dict[tuple[str, str, str], Numbers]) -> dict[str, Numbers]:
    result = {}
    for name in measured[0].values:
        values = np.array([m.values[name] for m in measured])
        by_picture: defaultdict[str, list[float]] = defaultdict(list)
        for m in measured:
            # Infinite where pixels are kept exactly.
            with np.errstate(invalid="ignore"):
                by_picture[m.picture].append(np.float64(m.values[name]) - base[_case(m)][name])
        difference, low, high = _interval(list(by_picture.values()))
        finite = values[np.isfinite(values)]
        worst = float(np.percentile(finite, 95)) if finite.size else mean(values)
        result[name] = {"mean": mean(values), "p95": worst, "difference": difference, "low": low, "high": high}
    return result


def mean(values: np.ndarray) -> float:
    """The mean over the cases that have the metric; a PSNR is infinite only where all of them are."""
    kept = values[~np.isnan(values)]
    finite = kept[np.isfinite(kept)]
    if not kept.size:
        return float("nan")
    return float(finite.mean()) if finite.size else float(kept[0])


def _interval(by_picture: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean of paired differences and its interval by bootstrap; NaN where there are none."""
    finite = [np.asarray(values)[np.isfinite(values)] for values in by_picture]
    sums = np.array([values.sum() for values in finite if values.size])
    counts = np.array([values.size for values in finite if values.size])
    if not counts.size:
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def exact_rows(summary: dict[str, Rows]) -> list[str]:
    """The rows that keep every pixel in every case."""
    rows = next(iter(summary.values()))
    return [row for row in rows if all(np.isinf(group[row]["psnr_preserved"]["mean"]) for group in summary.values())]


def seam_table(rows: Rows) -> str:
    """The means of every metric as Markdown, with the 95th percentiles of step and tone in brackets."""
    columns = {name: column for name, column in COLUMNS.items() if name in next(iter(rows.values()))}
    cells = []
    for row, metrics in rows.items():
        cell = [row]
        for name, (_, scale) in columns.items():
            worst = f" ({scale * metrics[name]['p95']:.2f})" if name in GOALS else ""
            cell.append(f"{scale * metrics[name]['mean']:.4g}{worst}")
        cells.append(cell)
    return markdown(["", *(title + (" (p95)" if n in GOALS else "") for n, (title, _) in columns.items())], cells)


def goal_table(summary: dict[str, Rows], against: str) -> str:
    """Step and tone over the natural protocols, with the paired intervals against one row, as Markdown."""
    cells = []
    for row, metrics in summary[TOGETHER].items():
        cell = [row]
        for name in GOALS:
            numbers = metrics[name]
            difference, low, high = (numbers[key] for key in ("difference", "low", "high"))
            cell += [f"{numbers['mean']:.2f}", "" if row == against else f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"]
        cells.append(cell)
    return markdown(["", "step, abs.", f"to {against}", "fill tone", f"to {against}"], cells)


def plot(path: str, summary: dict[str, Rows]) -> None:
    """Draws step against fill tone, one panel a protocol, for the rows that keep every pixel: lower left is best."""
    # Here, because only this needs it; without pyplot, which keeps global state.
    from matplotlib.figure import Figure

    names, groups = exact_rows(summary), [group for group in summary if group != TOGETHER]
    figure = Figure(figsize=(4.2 * len(groups), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(groups)))
    for panel, group in zip(panels, groups, strict=True):
        for row in names:
            x, y = (summary[group][row][name]["mean"] for name in ("tone", "step"))
            panel.plot(x, y, "o", color=COLOURS.get(row.split()[0], "tab:gray"))
            panel.annotate(row, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        panel.set(title=group, xlabel="fill tone, CIEDE2000")
        panel.margins(0.2)
    panels[0].set_ylabel("excess step, mean absolute, CIEDE2000")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
