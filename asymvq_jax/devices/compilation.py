"""Compiled programs that outlive a process: the cache on disk."""

from __future__ import annotations

from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk, so that the same program starts at once the next time.

    In the directory that JAX_COMPILATION_CACHE_DIR names, by default in ~/.cache/asymvq_jax/xla; JAX's own options
    (jax_persistent_cache_min_compile_time_secs, jax_enable_compilation_cache, ...) apply.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "asymvq_jax" / "xla"))
