"""What the command lines share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from asymvq_jax.config import UserError

P = ParamSpec("P")


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
            # As a shell has it for SIGINT.
            return 130

    return run
