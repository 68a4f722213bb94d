"""Frozen dataclasses from command-line arguments, with one kind of error for every command.

tyro reads the fields, their types, defaults and comments; this module decides what values look like and words errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

# Experimental in tyro, so requirements.txt holds tyro to one minor version, and tests/config/test_config.py sees
# every kind.
from tyro import _errors as events
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from asymvq_jax.errors import ConfigError

T = TypeVar("T")

# The field of a command's options that holds a configuration, whose fields are options of the command.
SETTINGS = "settings"
BOOLS = {"true": True, "1": True, "false": False, "0": False}
REGISTRY = ConstructorRegistry()


def parse(kind: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Builds a dataclass from `--name=value`, `--name value` and `--flag`; names with dashes or underscores.

    Args:
        kind: the dataclass; the fields of a nested one have dotted names.
        arguments: what follows the command's name. `--help` prints the help and raises SystemExit(0).
        prog: the command's name, for the help.
        default: the values of fields that are not named; None: the dataclass's own. `tyro.MISSING` marks required ones.

    Raises:
        ConfigError: a name that does not exist (the message gives the nearest that does), a value of another type or
            out of range, or a required name that is missing.
    """

    def fail(event: events.ParseErrorEvent) -> None:
        raise ConfigError(_message(event, kind)) from None

    given: dict[str, Any] = {} if default is None else {"default": default}
    with events.on_parse_error(fail):
        result: T = tyro.cli(
            kind,
            args=arguments,
            prog=prog,
            registry=REGISTRY,
            config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            **given,
        )
    return result


@REGISTRY.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How values of a type are written."""
    kind = info.type
    if kind is bool:
        return _spec(kind, "true|false", "true or false", lambda text: BOOLS[text.lower()], lambda x: str(x).lower())
    if kind in (int, float):
        return _spec(kind, kind.__name__.upper(), kind.__name__, kind, str)
    if info.type_origin is tuple:
        each = typing.get_args(kind)[0]
        metavar, wanted = f"{each.__name__.upper()},...", f"{each.__name__} values separated by commas"
        return _spec(tuple, metavar, wanted, functools.partial(_split, each), lambda x: ",".join(map(str, x)))
    return None


def _spec(
    kind: type, metavar: str, wanted: str, read: Callable[[str], Any], write: Callable[[Any], str]
) -> PrimitiveConstructorSpec[Any]:
    def instance(words: list[str]) -> Any:
        try:
            return read(words[0])
        except (KeyError, ValueError):
            raise ValueError(f"{words[0]!r}: expected {wanted}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=instance,
        is_instance=lambda x: isinstance(x, kind),
        str_from_instance=lambda x: [write(x)],
    )


def _split(kind: type, text: str) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.strip("()[] ").replace(" ", "").split(",") if part)


def _message(event: events.ParseErrorEvent, kind: type) -> str:
    """What the user reads: what is wrong, what was expected, what to do."""
    match event:
        case events.UnrecognizedArgs(tokens=[token, *_]):
            return _unknown(token, kind)
        case events.MissingArgs(missing_arguments=missing):
            # A misspelt name is most likely the one that is missing.
            if event.unrecognized_tokens:
                return _unknown(event.unrecognized_tokens[0], kind)
            options = [_flag(each.arg) for each in missing]
            are = "is" if len(options) == 1 else "are"
            return f"{' and '.join(options)} {are} missing; see {event.prog} --help"
        case events.BadValue(argument=argument):
            return f"{_flag(argument)}: a value is missing; write {_flag(argument)}=VALUE"
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_flag(argument)}={value!r}: expected one of {', '.join(choices)}"
        case events.InstantiationFailure(message=message, argument=argument):
            return message if argument is None else f"{_flag(argument)}={message}"
    return f"the options cannot be read; see {event.prog} --help"


def _flag(argument: Any) -> str:
    """An argument as the user writes it, fields of the configuration with underscores as in Python."""
    name: str = argument.lowered.name_or_flags[-1]
    return f"--{_normal(name[2:])}"


def _normal(name: str) -> str:
    return name.replace("-", "_") if "." in name else name.replace("_", "-")


def _unknown(token: str, kind: type) -> str:
    """Why a word of the command line is not an option."""
    leaves = [_normal(leaf) for leaf in names(kind)]
    if not token.startswith("--"):
        such = "--field=value or --field value, such as --run.steps=1000"
        return f"{token!r}: expected {such if '.' in leaves[-1] else '--option=value or --option value'}"
    name = _normal(token[2:].partition("=")[0])
    if group := [leaf for leaf in leaves if leaf.startswith(f"{name}.")]:
        return f"--{name} is a group; name one of its fields: {', '.join(f'--{leaf}' for leaf in group)}"
    if owner := next((leaf for leaf in leaves if name.startswith(f"{leaf}.")), None):
        return f"--{name}: {owner} has no fields of its own"
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.3)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return f"--{name} is not {'a field of the configuration' if '.' in name else 'an option'}{hint}"


def names(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields of a dataclass; those of a configuration beside options have no prefix."""
    for name, hint in typing.get_type_hints(getattr(kind, "__origin__", kind)).items():
        if dataclasses.is_dataclass(hint):
            yield from names(hint, "" if name == SETTINGS else f"{prefix}{name}.")
        else:
            yield prefix + name
