"""asymvq benchmark."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from asymvq_jax.commands.entry import group
from asymvq_jax.errors import ExitCode

ABOUT = """\
usage: asymvq benchmark NAME [OPTIONS]

Benchmarks of this package, most of them beside PyTorch. They lie in a clone of the repository, not in the package, and
need its test requirements: pip install -e '.[test]'.

  everything      all that a new accelerator is asked, in a given time: --minutes 9 --out DIR
  decode          the decode, beside diffusers'
  train_step      the training step, beside PyTorch's
  generate        Stable Diffusion's denoising loop, beside diffusers'
  profile         where the time of one of these goes, beside the cores' matrix peak
  input           the input pipeline, pictures a second
  large_pictures  memory and time of large pictures
  start_up        whole processes from start to a written picture, cold and warm
  int8            what convolutions in int8 would cost in quality
  reproduction    a small reproduction of the paper's comparison
  mutants         break the package in a copy, on purpose, to see whether the tests notice
  endurance       a run that is killed again and again, beside an undisturbed one
  embed           write the models inside the package from trained ones, and measure them

asymvq benchmark NAME --help lists the options.
"""
NAMES = (
    "everything", "decode", "train_step", "generate", "profile", "input", "large_pictures", "start_up", "int8",
    "reproduction", "mutants", "endurance", "embed",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--everything"]:
        words[0] = "everything"
    root = Path(__file__).parents[2]
    if words[:1] not in ([], ["-h"], ["--help"]) and not (root / "benchmarks" / "contest.py").is_file():
        print("error: the benchmarks lie in a clone of the repository, not in the installed package", file=sys.stderr)
        return ExitCode.WRONG_INPUT
    return group("asymvq benchmark", ABOUT, {name: _loader(name, root) for name in NAMES})(words)


def _loader(name: str, root: Path) -> Callable[[], Callable[[Sequence[str] | None], int]]:
    def load() -> Callable[[Sequence[str] | None], int]:
        if importlib.util.find_spec("benchmarks") is None:
            sys.path.insert(0, str(root))
        main: Callable[[Sequence[str] | None], int] = importlib.import_module(f"benchmarks.{name}").main
        return main

    return load
