"""The types of fields in other programs' JSON files, so that a null or a text where a number is wanted has a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Type(NamedTuple):
    """What a field may hold, in words and as a test."""

    name: str
    holds: Callable[[Any], bool]


COUNT = Type("a whole number above 0", lambda value: type(value) is int and value > 0)
# Layers, of which more would take for ever to lay out.
FEW = Type("a whole number from 1 to 100", lambda value: type(value) is int and 0 < value <= 100)
NUMBER = Type("a number", lambda value: type(value) in (int, float) and math.isfinite(value))
SWITCH = Type("true or false", lambda value: type(value) is bool)
TEXT = Type("a text", lambda value: type(value) is str)
COUNTS = Type("a list of whole numbers", lambda value: _list(value) and all(COUNT.holds(each) for each in value))
NUMBERS = Type("a list of numbers", lambda value: _list(value) and all(NUMBER.holds(each) for each in value))
SWITCHES = Type("a list of true and false", lambda value: _list(value) and all(SWITCH.holds(each) for each in value))
TEXTS = Type("a list of texts", lambda value: _list(value) and all(TEXT.holds(each) for each in value))
ONE_OR_MORE = Type("a whole number or a list of them", lambda value: COUNT.holds(value) or COUNTS.holds(value))


def _list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def wrong_fields(fields: Mapping[str, Any], types: Mapping[str, Type]) -> list[str]:
    """Every field that holds something of another type, with what is expected; absent fields are not counted."""
    return [
        f"{n}={fields[n]!r} (expected {t.name})" for n, t in types.items() if n in fields and not t.holds(fields[n])
    ]


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value; null is as good as nothing."""
    return {name: value for name, value in fields.items() if value is not None}
