"""Writes docs/reference/config.md, commands.md and errors.md from the code: python docs/write_reference.py.

The pages are kept in the repository, where they can be read without a build; tests/project/test_docs.py compares them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import tokenize
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from asymvq_jax import errors
from asymvq_jax.config import Config

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/write_reference.py from the code: change it there, and run the script again. -->"
# Every command, and the dataclass of its options.
OPTIONS = {
    "asymvq train": "commands.train.Train",
    "asymvq evaluate": "commands.evaluate.Evaluate",
    "asymvq inpaint": "commands.inpaint.Inpaint",
    "asymvq decode": "commands.decode.Decode",
    "asymvq generate text": "diffusion.settings.Text",
    "asymvq generate inpaint": "diffusion.settings.Inpaint",
    "asymvq generate edit": "diffusion.settings.Edit",
    "asymvq convert": "commands.convert.Convert",
    "asymvq export": "commands.export.Export",
    "asymvq score": "commands.score.Score",
    "asymvq build-data": "commands.build_data.BuildData",
    "asymvq masks": "commands.masks.Masks",
    "asymvq plan": "commands.plan.Plan",
    "asymvq plan table": "commands.plan_table.PlanTable",
    "asymvq plan denoising": "commands.plan_denoising.PlanDenoising",
    "asymvq page": "commands.page.Page",
    "asymvq serve": "commands.serve.Serve",
}
TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "", Path: "PATH"}


class Row(NamedTuple):
    """Fields that one comment describes."""

    fields: list[dataclasses.Field[Any]]
    comment: str


def pages() -> dict[Path, str]:
    """The pages' paths and contents."""
    written = {"config": config_page(), "commands": commands_page(), "errors": errors_page()}
    return {REFERENCE / f"{name}.md": text for name, text in written.items()}


def config_page() -> str:
    """All fields of a configuration."""
    parts = [
        "# Configuration",
        NOTE,
        "A file in `configs/` sets what differs from the defaults below. Every field is an option of `asymvq train`, "
        "`asymvq evaluate` and `asymvq plan` by its dotted name: `--model.dtype=bfloat16` or `--model.dtype bfloat16`. "
        "Several values are separated by commas: `--model.decoder_channels=256,512,1024,1024`.",
    ]
    for name, kind in groups(Config):
        lines = ["| field | default | meaning |", "| --- | --- | --- |"]
        for row in rows(kind):
            names = "<br>".join(f"`{name}.{field.name}`" for field in row.fields)
            lines.append(f"| {names} | {'<br>'.join(map(_default, row.fields))} | {_cell(row.comment)} |")
        parts += [f"## {name}", _text(kind), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """All options of all commands."""
    parts = [
        "# Commands",
        NOTE,
        "`asymvq COMMAND --help` prints the same. An option takes its value after a space or `=`, and dashes and "
        "underscores mean the same. `--traceback` after any command, or `ASYMVQ_TRACEBACK=1`, adds the stack of calls "
        "to an error message. [Exit codes](errors.md#exit-codes).",
    ]
    for prog, path in OPTIONS.items():
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(f"asymvq_jax.{module}"), name)
        lines = ["| option | default | meaning |", "| --- | --- | --- |"]
        hints = typing.get_type_hints(kind, include_extras=True)
        for row in rows(kind):
            names = "<br>".join(f"`--{f.name.replace('_', '-')}{_value(hints[f.name])}`" for f in row.fields)
            lines.append(f"| {names} | {'<br>'.join(map(_default, row.fields))} | {_cell(row.comment)} |")
        if any(dataclasses.is_dataclass(hint) for hint in typing.get_type_hints(kind).values()):
            lines.append("| `--GROUP.FIELD` | the config's | any field of the [configuration](config.md) |")
        parts += [f"## {prog}", _text(kind), "\n".join(lines)]
    benchmark = importlib.import_module("asymvq_jax.commands.benchmark")
    parts += ["## asymvq benchmark", f"```text\n{benchmark.ABOUT.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def errors_page() -> str:
    """Kinds of errors, and exit codes."""
    members = errors.ExitCode.__members__
    comments = {"DONE": "Done."} | _comments(errors.ExitCode, members)
    lines = ["| code | name | meaning |", "| --- | --- | --- |"]
    lines += [f"| {code.value} | `{name}` | {_cell(comments[name])} |" for name, code in members.items()]
    parts = [
        "# Errors and exit codes",
        NOTE,
        "What you can mend ends a command with one line that begins with `error:` and no traceback: what is wrong, "
        "what was expected, what to do. In Python the same is an exception from `asymvq_jax.errors`. A traceback is a "
        "bug.",
        "## Exit codes",
        _text(errors.ExitCode),
        "\n".join(lines),
        "Also 134, where JAX itself notices first that another process has ended, and aborts with its own message.",
        "## Exceptions",
    ]
    lines = ["| exception | is a | when |", "| --- | --- | --- |"]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == errors.__name__:
            lines.append(f"| `{name}` | `{kind.__bases__[0].__name__}` | {_cell(_text(kind))} |")
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def groups(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield prefix + name, hint
            yield from groups(hint, f"{prefix}{name}.")


def rows(kind: Any) -> list[Row]:
    """A dataclass's fields in order, without groups; a comment describes the fields below it up to the next comment."""
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments(base, vars(base).get("__annotations__", {}))
    hints = typing.get_type_hints(kind)
    result: list[Row] = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        if field.name in comments or not result:
            result.append(Row([field], comments.get(field.name, "")))
        else:
            result[-1].fields.append(field)
    return result


def _comments(kind: Any, names: Iterable[str]) -> dict[str, str]:
    """The comment above each of a class's members that has one."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            lines.append(token.string.removeprefix("#").strip())
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if lines and token.type == tokenize.NAME and token.string in names:
                found.setdefault(token.string, " ".join(lines))
            lines = []
    return found


def _value(hint: Any) -> str:
    """What follows an option's name."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f" {{{','.join(map(str, arguments))}}}"
    if type(None) in typing.get_args(hint):
        return _value(arguments[0])
    name = TYPES.get(hint, "VALUE")
    return f" {name}" if name else ""


def _default(field: dataclasses.Field[Any]) -> str:
    """A default as one would type it; nothing where None stands for what was not given."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    for special, text in ((None, ""), ("", "empty"), ((), "none"), (False, "off"), (True, "on")):
        if value is special or (value == special and isinstance(value, str | tuple)):
            return text
    values = value if isinstance(value, tuple) else str(value).split(",")
    # Spaces, where long ones may be broken.
    return " ".join(f"`{part}`" for part in ", ".join(map(str, values)).split())


def _text(kind: Any) -> str:
    """A docstring's paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(kind.__doc__ or "").split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path)
