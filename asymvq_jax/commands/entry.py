"""How every command begins and ends: options, logging, and one table of errors and exit codes."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

from asymvq_jax.config.loading import parse
from asymvq_jax.errors import EXIT_CODES, ExitCode, exit_code

T = TypeVar("T")
Main = Callable[[Sequence[str] | None], int]


def command(
    prog: str,
    options: type[T],
    work: Callable[[T], int | None],
    *,
    positional: Sequence[str] = (),
    clock: bool = False,
) -> Main:
    """Makes the `main` of a command: options are parsed and checked, then the work is done.

    Args:
        prog: what the user types, such as "asymvq convert".
        options: a frozen dataclass; its docstring and the comments above its fields are the help.
        work: takes the parsed options; returns the exit code, or None for 0. It imports what is slow to import.
        positional: fields that may also be given without their names, in this order, as before release 0.2.
        clock: whether log lines begin with the time, for commands that run for hours.

    Returns:
        A function of the arguments (by default the process's), which returns the exit code.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        stack = "--traceback" in words or os.environ.get("ASYMVQ_TRACEBACK", "") not in ("", "0")
        words = [word for word in words if word != "--traceback"]
        _start_logging(clock)
        try:
            with _interruptible_imports():
                return work(parse(options, _name_positional(words, options, positional), prog=prog)) or ExitCode.DONE
        except KeyboardInterrupt as interrupt:
            print(interrupt.args[0] if interrupt.args else "interrupted", file=sys.stderr)
            return ExitCode.INTERRUPTED
        except tuple(EXIT_CODES) as error:
            if stack:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return exit_code(error)

    return main


def group(prog: str, about: str, members: Mapping[str, Callable[[], Main]]) -> Main:
    """Makes the `main` of a command whose first word says which of several commands is meant.

    Args:
        prog: what the user types before that word.
        about: the help.
        members: the word for each command, and what returns its `main`, so that only one module is imported.

    Returns:
        As `command`.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        name = words[0] if words else "--help"
        if name in members:
            return members[name]()(words[1:])
        if name in ("-h", "--help", "help"):
            print(about.rstrip())
            return ExitCode.DONE if words else ExitCode.WRONG_INPUT
        near = difflib.get_close_matches(name, members, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: {prog} {name}: expected one of {', '.join(members)}{hint}", file=sys.stderr)
        return ExitCode.WRONG_INPUT

    return main


def leave(code: int) -> NoReturn:
    """Ends the process with the exit code that a `main` has returned."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == ExitCode.INTERRUPTED:
        # At once: JAX's threads still work, and would crash in an interpreter that is being taken down.
        os._exit(code)
    if code not in (ExitCode.DONE, ExitCode.SAVED) and "jax" in sys.modules:
        from asymvq_jax.devices import cluster

        cluster.leave(code)
    sys.exit(code)


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Inside, Ctrl-C during an import ends the process at once.

    Extensions written in C, such as NumPy's and JAX's, make an ImportError with a traceback of the interruption.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if any(each.f_code.co_filename == "<frozen importlib._bootstrap>" for each, _ in traceback.walk_stack(frame)):
            os.write(2, b"interrupted\n")
            os._exit(ExitCode.INTERRUPTED)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _start_logging(clock: bool) -> None:
    """This package's progress goes to stderr, and of other libraries their warnings."""
    form = "%(asctime)s %(message)s" if clock else "%(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", force=True)
    logging.getLogger("asymvq_jax").setLevel(logging.INFO)


def _name_positional(words: Sequence[str], options: type, fields: Sequence[str]) -> list[str]:
    """The words of a command line, those without an option's name before them given the names of `fields`, in order."""
    flags = {name for name, hint in typing.get_type_hints(options).items() if hint is bool}
    result: list[str] = []
    left, value_follows = list(fields), False
    for word in words:
        if word.startswith("--") and not value_follows:
            name = word[2:].replace("-", "_")
            value_follows = "=" not in word and name not in flags and name != "help"
        elif not value_follows and left and word != "-h":
            word = f"--{left.pop(0)}={word}"
        else:
            value_follows = False
        result.append(word)
    return result
