"""Breaks the package on purpose, in a copy, to see whether the tests notice: asymvq benchmark mutants [--only NAME]."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from asymvq_jax.commands.entry import command
from asymvq_jax.errors import ConfigError, ExitCode
from benchmarks.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
# What the tests need of a clone.
COPIED = ("asymvq_jax", "benchmarks", "configs", "tests", "pyproject.toml", "train.py", "eval.py")
# pytest's exit codes.
PASSED, FAILED = 0, 1


@dataclass(frozen=True, kw_only=True)
class Mutants:
    """Break the package on purpose, in a copy, and look whether the tests notice."""

    # A part of the names, or of the files, of the mutations to try; all of them by default.
    only: str = ""
    # Seconds after which a mutation that makes a test hang counts as noticed.
    limit: int = 600


def work(options: Mutants) -> int:
    """Prints a table of the mutations; returns 1 where one survived."""
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name or options.only in mutation.file]
    if not chosen:
        raise ConfigError(
            f"--only {options.only!r}: expected a part of a mutation's name or file, such as {MUTATIONS[0].name!r}"
        )
    if stale := [f"{m.name!r} ({m.file})" for m in chosen if not applies(m, ROOT)]:
        raise ConfigError(f"these mutations no longer apply, as their text does not occur once: {', '.join(stale)}")
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, copy / name)
        tests = dict.fromkeys(test for mutation in chosen for test in mutation.tests)
        if _pytest(copy, tests, options.limit * len(tests)) != PASSED:
            raise ConfigError("the tests fail without a mutation; run them with pytest first")
        survivors = 0
        print("| mutation | file | verdict | seconds |\n| --- | --- | --- | --- |")
        for mutation in chosen:
            begin = time.monotonic()
            killed = _is_killed(mutation, copy, options.limit)
            survivors += not killed
            verdict = "killed" if killed else "**survived**"
            print(f"| {mutation.name} | {mutation.file} | {verdict} | {time.monotonic() - begin:.0f} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations killed, {survivors} survived")
    return ExitCode.FAILED if survivors else ExitCode.DONE


def applies(mutation: Mutation, root: Path) -> bool:
    """Whether the mutation's text occurs exactly once in its file below `root`."""
    return (root / mutation.file).read_text().count(mutation.old) == 1


def _is_killed(mutation: Mutation, copy: Path, limit: int) -> bool:
    file = copy / mutation.file
    sound = file.read_text()
    file.write_text(sound.replace(mutation.old, mutation.new))
    try:
        code = _pytest(copy, mutation.tests, limit)
    finally:
        file.write_text(sound)
    if code not in (PASSED, FAILED, None):
        raise ConfigError(f"{mutation.name}: pytest ended with {code}: the mutation breaks more than it means to")
    return code != PASSED


def _pytest(copy: Path, tests: Iterable[str], limit: int) -> int | None:
    """The exit code of these tests in the copy; None where they did not end in time."""
    # No bytecode: that of a mutation must not be taken for the sound module's, which may be as long and as old.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        process = subprocess.run(words, cwd=copy, env=environment, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    if process.returncode not in (PASSED, FAILED):
        print(process.stdout.decode()[-2000:], process.stderr.decode()[-2000:], sep="\n", file=sys.stderr)
    return process.returncode


main = command("asymvq benchmark mutants", Mutants, work)
