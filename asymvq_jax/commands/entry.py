"""What the command lines share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from asymvq_jax.errors import UserError

P = ParamSpec("P")
# As a shell has it for SIGINT.
INTERRUPTED = 130


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Lets a user's mistake end `main` with a message and exit code 2, and Ctrl-C with 130; without traceback."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return run


def leave(code: int) -> NoReturn:
    """Ends the process with the exit code that `main` has returned."""
    if code == INTERRUPTED:
        # At once: JAX's threads still work, and would crash in an interpreter that is being taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
