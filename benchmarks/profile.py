"""Where a program's time goes, beside its arithmetic at the matrix peak: asymvq benchmark profile [--what decode]."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from asymvq_jax.commands.entry import command
from asymvq_jax.config import ModelConfig, load_config
from asymvq_jax.diffusion.unet import UNetConfig
from asymvq_jax.plan.counting import callees, in_scope, instructions, operation
from benchmarks import contest, decode, generate, subjects, train_step

MULTIPLYING = ("convolutions", "matrix products", "attention")
CONVOLUTION, PRODUCT, ATTENTION = MULTIPLYING
OTHER, COPY = "normalisation and all else", "copies, transposes, padding"
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "dynamic-slice", "dynamic-update-slice",
    "fusion", "get-tuple-element", "pad", "parameter", "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip
# What stands around other operations, whose times are counted.
_AROUND = {"call", "conditional", "while"}


@dataclass(frozen=True, kw_only=True)
class Profile(contest.Options):
    """Where a program's time goes, by kinds of operations, and what its arithmetic would take at the matrix peak."""

    # The program: decode, train_step, or generate (text-to-image at Stable Diffusion 1.5's sizes).
    what: Literal["decode", "train_step", "generate"] = "decode"
    # Steps of text-to-image.
    steps: int = 4
    # Traced runs; of an operation's times the least counts.
    rounds: int = 5


def work(options: Profile) -> None:
    """Measures, and prints tables."""
    run, flops = _prepare(options)
    run()
    memory, walls, traces = contest.peak_memory(), [], []
    peak = contest.matrix_peak(options.dtype)
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                begin = time.perf_counter()
                run()
                walls.append(time.perf_counter() - begin)
            traces.append(_operations(Path(folder)))
    peak = max(peak, contest.matrix_peak(options.dtype))
    programs = [
        (module.name, module.to_string(), program.get_compiled_memory_stats())
        for program in jax.devices()[0].client.live_executables()
        for module in program.hlo_modules()
    ]
    # Of programs of one name the largest's.
    kind = {name: kinds(text) for name, text, _ in sorted(programs, key=lambda x: len(x[1]))}
    spent: Counter[str] = Counter()
    for module, name in traces[0]:
        if (what := kind.get(module, {}).get(name, OTHER)) is not None:
            spent[what] += min(trace[module, name] for trace in traces)
    print(f"\n{options.what}, {options.config}, {options.batch} x {options.size} px, {options.dtype}")
    print(f"{contest.machine()}\nthe shortest of {options.rounds} runs took {min(walls):.3g} s\n")
    print(report(spent, flops, peak))
    print(
        f"\nThe process held {memory / 2**30:.2f} GiB until the first run was done. The compiler's, for its programs:"
    )
    for name, _, stats in programs:
        if stats.temp_size_in_bytes >= 2**20 and any(name == module for module, _ in traces[0]):
            new = stats.output_size_in_bytes - stats.alias_size_in_bytes
            sizes = {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes, "results": new}
            print(f"{name}: " + ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in sizes.items()))


def report(spent: Mapping[str, float], flops: float, peak: float) -> str:
    """Shares of the time, and the arithmetic beside the peak.

    Args:
        spent: seconds of each kind of operation.
        flops: of convolutions and matrix products, those of attention among them.
        peak: FLOP/s of a large matrix product.
    """
    total, multiplying = sum(spent.values()), sum(spent.get(kind, 0.0) for kind in MULTIPLYING)
    rows = [
        f"| {kind} | {spent[kind]:.3g} s | {spent[kind] / total:.1%} |"
        for kind in (*MULTIPLYING, OTHER, COPY)
        if kind in spent
    ]
    return "\n".join(["| | time | share |\n| --- | --- | --- |", *rows, f"| all | {total:.3g} s | |"]) + (
        f"\n\nProducts of large matrices reach {peak / 1e12:.3g} TFLOP/s, at which {flops / 1e12:.3g} TFLOP take "
        f"{flops / peak:.3g} s; in convolutions, products and attention they take {multiplying:.3g} s, "
        f"{flops / peak / multiplying:.0%} of that peak, and {flops / peak / total:.0%} with all else."
    )


def _prepare(options: Profile) -> tuple[contest.Run, float]:
    """What is profiled, with random weights, and its FLOPs."""
    if options.what == "generate":
        unet, plain = UNetConfig(), subjects.random_model(ModelConfig(condition=False, dtype=options.dtype))
        arrays = generate.inputs(unet, options.batch, options.size)
        run = generate.generating(subjects.random_unet(unet, options.dtype), plain, arrays, steps=options.steps)
        return run, generate.flops(unet, arrays, options.steps)
    config = load_config(options.config, [f"--model.dtype={options.dtype}"])
    arrays = subjects.pictures(config.model, options.batch, options.size)
    if options.what == "train_step":
        return train_step.training(config, arrays), train_step.flops(config, arrays)
    return decode.decoding(subjects.random_model(config.model), arrays), decode.flops(config.model, arrays)


def _operations(folder: Path) -> Counter[tuple[str, str]]:
    """Seconds of each operation in a trace, by its module and its name."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    found: Counter[tuple[str, str]] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats: dict[str, Any] = dict(event.stats)
            if "hlo_op" in stats and "hlo_module" in stats:
                found[stats["hlo_module"], stats["hlo_op"]] += event.duration_ns / 1e9
    return found


def kinds(hlo: str) -> dict[str, str | None]:
    """The kind of every operation of a compiled module; None: of those around others, whose times are counted."""
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for computation, line in instructions(hlo):
        lines[computation].append(line)
    return {
        found[0]: None if found[1] in _AROUND else _kind(line, lines)
        for line in [line for inside in lines.values() for line in inside]
        if (found := operation(line))
    }


def _kind(line: str, lines: Mapping[str, list[str]]) -> str:
    codes, pending = set(), [line]
    while pending:
        if found := operation(each := pending.pop()):
            codes.add(found[1])
            pending += [inner for name in callees(each) for inner in lines.get(name, ())]
    # The scope in which the layers mix values by queries and keys.
    if in_scope(line, "attention"):
        return ATTENTION
    if any("conv" in code for code in codes - _MOVES):
        return CONVOLUTION
    if any(code == "dot" or "matmul" in code or "gemm" in code for code in codes):
        return PRODUCT
    return COPY if codes <= _MOVES else OTHER


main = command("asymvq benchmark profile", Profile, work)
