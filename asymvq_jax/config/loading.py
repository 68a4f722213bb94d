"""Configurations from Python files, dotted command-line overrides and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import runpy
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from asymvq_jax.config import command_line
from asymvq_jax.config.fields import Config
from asymvq_jax.config.masks import MASK_PRESETS, MaskConfig
from asymvq_jax.errors import ConfigError, first_line

T = TypeVar("T")

# A configuration beside a command's own options: its fields are options too, with dotted names.
Settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
# Where the published configurations are: inside an installed package, or beside it in a clone.
PUBLISHED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Builds the configuration of a file and applies command-line overrides to it.

    Args:
        path: a Python file that defines `get_config() -> Config`, or the name of a published one, such as "x2".
        overrides: "--model.dtype=bfloat16" or "--model.dtype", "bfloat16"; see `override`.

    Raises:
        ConfigError: the file is missing or defines no configuration; an override names no field or has a value of
            another type; a value is out of range.
    """
    path = _find(str(path))
    if path.suffix in (".json", ".yaml", ".yml", ".toml"):
        raise ConfigError(
            f"{path}: expected a Python file that defines get_config(); configs/ has short ones to begin with"
        )
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    # The file is the user's program, which may fail in any way.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}{_line(error, path)}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: expected a function get_config() that returns an asymvq_jax.config.Config")
    return override(config, overrides)


def _line(error: BaseException, path: Path) -> str:
    """Where in a configuration's file an error was raised, such as ", line 3"; empty where that is not known."""
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = own[-1] if own else getattr(error, "lineno", None)
    return f", line {line}" if line else ""


def published() -> dict[str, Path]:
    """The files of the published configurations by their names."""
    folder = next((folder for folder in PUBLISHED if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py"))}


def _find(name: str) -> Path:
    if "://" in name:
        raise ConfigError(f"--config {name}: expected the name of a published configuration, or a file of this machine")
    path, known = Path(name), published()
    if path.is_file():
        return path
    if name in known:
        return known[name]
    if path.suffix == ".py" or path.name != name:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        hint += f" Published are {', '.join(known)}; or name a .py file"
    raise ConfigError(f"config file {name} does not exist{hint}")


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with fields replaced by dotted command-line arguments (see `load_config`).

    --data.mask=PRESET takes all fields of one of `MASK_PRESETS`, before any single field wherever that stands.
    """
    config, rest = _take_preset(config, arguments)
    if not rest:
        return config
    kind: type[Config] = typing.cast(Any, Annotated[Config, tyro.conf.FlagConversionOff])
    return command_line.parse(kind, rest, prog="", default=config)


def parse(kind: type[T], arguments: Sequence[str], *, prog: str) -> T:
    """As `command_line.parse`, for the options of a command.

    Options with the fields `config: str` and `settings: Settings` have the fields of a configuration as well: those of
    the file that `--config` names, replaced by the arguments.
    """
    own = {f.name: f.default for f in dataclasses.fields(typing.cast(Any, kind))}
    name = _value_of("--config", arguments) or own.get("config")
    if command_line.SETTINGS not in own or not isinstance(name, str):
        # Without a file there is only the help to print, or the error that asks for one.
        return command_line.parse(kind, arguments, prog=prog)
    config, rest = _take_preset(load_config(name), arguments)
    own = {field: tyro.MISSING if value is dataclasses.MISSING else value for field, value in own.items()}
    return command_line.parse(kind, rest, prog=prog, default=kind(**own | {"settings": config}))


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What follows the last `option`, before it is known which other options there are."""
    found = None
    for i, word in enumerate(arguments):
        name, equals, text = word.partition("=")
        if name == option and (equals or i + 1 < len(arguments)):
            found = text if equals else arguments[i + 1]
    return found


def _take_preset(config: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration with the fields of --data.mask=PRESET, and the arguments without that."""
    rest, words = [], iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        if name != "--data.mask":
            rest.append(word)
            continue
        preset = text if equals else next(words, "")
        if preset not in MASK_PRESETS:
            fields = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(MaskConfig))
            raise ConfigError(
                f"{name} is a group; name one of its fields: {fields}; or a preset: {', '.join(MASK_PRESETS)}"
            )
        mask = dataclasses.replace(config.data.mask, **MASK_PRESETS[preset])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mask=mask))
    return config, rest


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields by their dotted names."""
    result: dict[str, Any] = {}
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        name = prefix + field_.name
        result |= flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return result


def changed(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields that do not have their dataclass's default, by their dotted names."""
    result: dict[str, Any] = {}
    for field_ in dataclasses.fields(config):
        value = getattr(config, field_.name)
        if dataclasses.is_dataclass(value):
            result |= changed(value, f"{prefix}{field_.name}.")
        elif value != field_.default:
            result[prefix + field_.name] = value
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
