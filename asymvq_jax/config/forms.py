"""What a configuration's fields may hold: every value is checked against its field's type and kept in one form."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
import typing
from collections.abc import Hashable, Sequence
from typing import Annotated, Any

import tyro

from asymvq_jax.errors import ConfigError

# A path of this machine or of a bucket (gs://...); a leading ~ is the home directory.
PathText = Annotated[str, "path"]


def one_of(values: Sequence[str]) -> Any:
    """What the annotation of a text field has, for the help to show its values; they are checked by `require`."""
    return tyro.conf.arg(metavar=f"{{{','.join(values)}}}")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ConfigError unless `condition` holds for the field `name`."""
    if not condition:
        raise ConfigError(f"{name}={value!r}: expected {expected}")


def settle(config: Any, group: str) -> None:
    """Brings every field of a new frozen dataclass into the form that its type names.

    Lists become tuples, paths text with the home directory in place of ~, integers floats where the field is a float,
    and NumPy's numbers Python's; so that a configuration equals the one that is read back from JSON.

    Args:
        config: the dataclass, from its __post_init__.
        group: its dotted name, for messages; empty for the whole configuration.

    Raises:
        ConfigError: a value of another type, a number that is not finite, or a tuple of another length.
    """
    for name, hint in field_types(typing.cast(Hashable, type(config))).items():
        full = f"{group}.{name}".lstrip(".")
        object.__setattr__(config, name, _settled(full, getattr(config, name), hint))


@functools.cache
def field_types(kind: Hashable) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(kind, include_extras=True)


def _settled(name: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, typing.cast(type, hint)), name, value, f"a {getattr(hint, '__name__', hint)}")
        return value
    if typing.get_origin(hint) is tuple:
        return _settled_tuple(name, value, typing.get_args(hint))
    if hint is bool:
        require(type(value).__name__ in ("bool", "bool_"), name, value, "True or False")
        return bool(value)
    if hint is int:
        try:
            require(not isinstance(value, bool), name, value, "an integer")
            return operator.index(value)
        except TypeError:
            require(False, name, value, "an integer")
    if hint is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        require(real and math.isfinite(value), name, value, "a finite number")
        return float(value)
    return _settled_text(name, value, is_path=hint == PathText)


def _settled_tuple(name: str, value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = {int: "integers", float: "numbers"}[hints[0]]
    if hints[-1] is Ellipsis:
        require(isinstance(value, list | tuple), name, value, f"a tuple of {kind}")
        hints = hints[:1] * len(value)
    else:
        sized = isinstance(value, list | tuple) and len(value) == len(hints)
        require(sized, name, value, f"a tuple of {len(hints)} {kind}")
    return tuple(_settled(name, item, hint) for item, hint in zip(value, hints, strict=True))


def _settled_text(name: str, value: Any, *, is_path: bool) -> str:
    if is_path and isinstance(value, os.PathLike):
        value = os.fspath(value)
    require(isinstance(value, str), name, value, "a path, as text" if is_path else "text")
    require("\0" not in value, name, value, "text without null characters")
    if is_path and value.startswith("~"):
        expanded: str = os.path.expanduser(value)
        known = not expanded.startswith("~")
        require(known, name, value, "a path; no home directory is known for it: write the path in full")
        return expanded
    return str(value)
