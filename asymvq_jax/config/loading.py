"""Configurations from Python files, dotted command-line overrides and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import runpy
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from asymvq_jax.config.fields import MASK_PRESETS, Config, MaskConfig
from asymvq_jax.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Builds the configuration of a file in configs/ and applies command-line overrides to it.

    Args:
        path: a Python file that defines `get_config() -> Config`.
        overrides: "--model.dtype=bfloat16" or "--model.dtype", "bfloat16"; see `override`.

    Raises:
        ConfigError: the file is missing or defines no configuration; an override names no field or has a value of
            another type; a value is out of range.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"config file {path} does not exist{hint}")
    get_config = runpy.run_path(str(path)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: expected a function get_config() that returns an asymvq_jax.config.Config")
    return override(config, overrides)


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with fields replaced by dotted command-line arguments (see `load_config`).

    --data.mask=PRESET takes all fields of one of `MASK_PRESETS`, before any single field wherever that stands.
    """
    presets: dict[str, Any] = {}
    tree: dict[str, Any] = {}
    for name, text in _pairs(arguments):
        if name == "data.mask" and text in MASK_PRESETS:
            presets = {"data": {"mask": MASK_PRESETS[text]}}
            continue
        node, kind = tree, Config
        *parents, leaf = name.split(".")
        for depth, part in enumerate(parents):
            kind = _field_type(kind, part, ".".join(parents[:depth]))
            if not dataclasses.is_dataclass(kind):
                raise ConfigError(f"--{name}: {'.'.join(parents[: depth + 1])} has no fields of its own")
            node = node.setdefault(part, {})
        kind = _field_type(kind, leaf, ".".join(parents))
        if dataclasses.is_dataclass(kind):
            names = ", ".join(f"--{name}.{f.name}" for f in dataclasses.fields(kind))
            preset = f"; or a preset: {', '.join(MASK_PRESETS)}" if kind is MaskConfig else ""
            raise ConfigError(f"--{name} is a group; name one of its fields: {names}{preset}")
        node[leaf] = _parse(text, kind, name)
    return _replace(_replace(config, presets), tree)


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r}: expected --field=value or --field value, such as --run.steps=1000")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(rest, None)
            if text is None:
                raise ConfigError(f"--{name}: a value is missing; write --{name}=VALUE")
        yield name, text


def _field_type(kind: type, name: str, parent: str) -> Any:
    hints = typing.get_type_hints(kind)
    if name in hints:
        return hints[name]
    full = f"{parent}.{name}".lstrip(".")
    near = difflib.get_close_matches(full, _all_names(Config), n=1, cutoff=0.3)
    hint = f"; did you mean --{near[0]}?" if near else ""
    raise ConfigError(f"--{full} is not a field of the configuration{hint}")


def _all_names(kind: type, prefix: str = "") -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(kind).items():
        names += _all_names(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return names


def _parse(text: str, kind: Any, name: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(kind, types.GenericAlias) and kind.__origin__ is tuple:
            parts = [p for p in text.strip("()[] ").replace(" ", "").split(",") if p]
            return tuple(kind.__args__[0](p) for p in parts)
        return kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))
        if isinstance(kind, types.GenericAlias):
            wanted = f"{kind.__args__[0].__name__} values separated by commas"
        raise ConfigError(f"--{name}={text!r}: expected {wanted}") from None


def _replace(config: Any, tree: dict[str, Any]) -> Any:
    changes = {k: _replace(getattr(config, k), v) if isinstance(v, dict) else v for k, v in tree.items()}
    return dataclasses.replace(config, **changes) if changes else config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by their dotted names."""
    result: dict[str, Any] = {}
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        name = prefix + field_.name
        result |= flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return result


def to_json(config: Any) -> str:
    """Serialises a configuration dataclass."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(kind: type, values: dict[str, Any], parent: str = "") -> Any:
    """Rebuilds the configuration dataclass `kind` from parsed JSON, which an earlier version may have written.

    Raises:
        ConfigError: a name that the dataclass lacks (the file is of another version, or no configuration at all), or
            a value that the field cannot have.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{parent.rstrip('.') or kind.__name__}={values!r}: expected the fields of a {kind.__name__}")
    if kind is Config:
        values = _upgraded(values)
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        full = f"{parent}{name}"
        if name not in hints:
            raise ConfigError(f"{full} is not a field of {kind.__name__}; was the file written by another version?")
        arguments[name] = from_dict(hints[name], value, f"{full}.") if dataclasses.is_dataclass(hints[name]) else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{parent.rstrip('.') or kind.__name__} lacks a field: {error}") from None


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration of release 0.1, in which a minimum above the peak stood for a constant rate."""
    try:
        optimizer, batch = values["optimizer"], values["data"]["batch_size"]
        constant = optimizer["min_learning_rate"] > optimizer["base_learning_rate"] * batch
        if "schedule" in optimizer or not constant:
            return values
        kept = {name: value for name, value in optimizer.items() if name != "min_learning_rate"}
    except (KeyError, TypeError):
        return values
    return {**values, "optimizer": {**kept, "schedule": "constant"}}
