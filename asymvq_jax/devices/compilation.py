"""Compiling, and compiled programs that outlive a process: the cache on disk."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import jax
from etils import epath

from asymvq_jax.files.outputs import try_out

log = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that the same program starts at once the next time.

    In the directory that JAX_COMPILATION_CACHE_DIR names, by default in ~/.cache/asymvq_jax/xla; JAX's own options
    (jax_persistent_cache_min_compile_time_secs, jax_enable_compilation_cache, ...) apply. The cache only saves time:
    where it cannot be written, programs are compiled anew.
    """
    name = "jax_compilation_cache_dir"
    chosen = getattr(jax.config, name)
    try:
        place = chosen or str(Path.home() / ".cache" / "asymvq_jax" / "xla")
        try_out(epath.Path(place))
    # Path.home() raises RuntimeError for a user who has none.
    except (OSError, RuntimeError) as error:
        log.info("compiled programs are not kept: %s", error)
        jax.config.update(name, None)
        return
    jax.config.update(name, place)


def compiled(program: jax.stages.Traced | jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program, and returns to the system the memory that compiling leaves free in the C library's heap.

    That is over 1 GiB after a training step of base, which else stays with the process and adds to its peak.
    """
    done = (program.lower() if isinstance(program, jax.stages.Traced) else program).compile()
    # Of glibc alone.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return done
