"""Weights between JAX and PyTorch: names, layouts, files. `asymvq_jax.convert(source, target, ...)` converts."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Convert(ModuleType):
    """The package, which as a function is `asymvq_jax.convert.convert.convert`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from asymvq_jax.convert.convert import convert

        return convert(*arguments, **options)


sys.modules[__name__].__class__ = _Convert
