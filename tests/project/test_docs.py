"""Documentation: links, code, commands, and what is written from the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import runpy
import subprocess
import typing

import pytest
import yaml
from pages import PAGES, Block, anchors, blocks, commands, inline_commands, links, tool
from processes import ROOT

import asymvq_jax
from asymvq_jax import __main__ as asymvq
from asymvq_jax.commands import benchmark, entry
from asymvq_jax.config import Config, flatten, load_config

BLOCKS = [block for page in PAGES for block in blocks(page)]


def name(value):
    """A test's name for a page or a block."""
    if isinstance(value, Block):
        return f"{value.page.relative_to(ROOT)}:{value.line}"
    return str(value.relative_to(ROOT))


@pytest.fixture(scope="module")
def reference():
    return runpy.run_path(str(ROOT / "docs" / "write_reference.py"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: the page has {sorted(anchors(target))}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=name)
def test_python_parses_and_its_imports_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asymvq_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "asymvq_jax":
            assert hasattr(asymvq_jax, node.attr), f"asymvq_jax.{node.attr}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.marked], ids=name)
def test_marked_python_runs(block):
    exec(compile(block.text, name(block), "exec"), {})


def synopsis(block):
    """A block of the shell without the brackets around what may be left out."""
    return re.sub(r"[\[\]]", "", block.text)


class Parsed(BaseException):
    """Ends a command once its options are read."""


def read_options(words, monkeypatch):
    """Reads a command line as the command itself does, without doing its work; returns the exit code."""

    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    parse = entry.parse
    monkeypatch.setattr(entry, "parse", stop)
    try:
        return asymvq.main(words)
    except Parsed:
        return 0
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh" and "asymvq" in b.text], ids=name)
def test_commands_can_be_read(block, monkeypatch, capsys):
    for words in commands(synopsis(block)):
        if words[0] == "benchmark":
            check_benchmark(words)
            continue
        assert read_options(words, monkeypatch) == 0, f"asymvq {' '.join(words)}: {capsys.readouterr().err}"


def check_benchmark(words):
    """As `read_options`, from the source: importing a benchmark takes as long as importing PyTorch and diffusers."""
    assert words[1] in benchmark.NAMES
    files = [ROOT / "benchmarks" / name for name in (f"{words[1]}.py", f"{words[1]}/command.py", "contest.py")]
    nodes = [node for file in files if file.is_file() for node in ast.walk(ast.parse(file.read_text()))]
    fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    fields |= set(flatten(load_config("demo")))
    options = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    assert not {option for option in options if option.replace("-", "_") not in fields}, words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_the_text_exist(page, reference):
    fields = set(flatten(load_config("demo"))) | {"data.mask"}
    for words in inline_commands(page):
        if words[0] in ("COMMAND", "--version"):
            continue
        if words[0] == "benchmark":
            check_benchmark(words)
            continue
        prog = next(
            " ".join(["asymvq", *words[:n]]) for n in (2, 1) if " ".join(["asymvq", *words[:n]]) in known(reference)
        )
        kinds = known(reference)[prog]
        options = {o.partition("=")[0].removeprefix("--") for o in words if o.startswith("--")}
        allowed = {f.name for kind in kinds for f in dataclasses.fields(kind)} | {"help", "traceback"}
        if any(Config in typing.get_type_hints(kind).values() for kind in kinds):
            allowed |= fields
        unknown = {o for o in options if o not in allowed and o.replace("-", "_") not in allowed}
        assert not unknown, f"asymvq {' '.join(words)}"


def known(reference):
    """The options' dataclasses of every command; those of a group are those of its members."""
    found: dict[str, list[type]] = {}
    for prog, path in reference["OPTIONS"].items():
        module, _, kind = path.rpartition(".")
        kind = getattr(importlib.import_module(f"asymvq_jax.{module}"), kind)
        found.setdefault(prog, []).insert(0, kind)
        group = " ".join(prog.split()[:2])
        if group != prog:
            found.setdefault(group, []).append(kind)
    return found


def test_the_reference_is_what_the_code_says(reference):
    for path, text in reference["pages"]().items():
        assert path.read_text() == text, f"{path.name} is out of date: python docs/write_reference.py"


def test_the_reference_has_every_command_and_every_comment(reference):
    listed = {prog.split()[1] for prog in reference["OPTIONS"]}
    assert listed | {"benchmark"} == set(asymvq.COMMANDS)
    silent = [
        kind
        for kinds in known(reference).values()
        for kind in kinds
        for row in reference["rows"](kind)
        if not row.comment
    ]
    silent += [name for name, kind in reference["groups"](Config) for row in reference["rows"](kind) if not row.comment]
    assert not silent, "fields without a comment above them"


def test_every_page_and_config_is_listed():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.SafeLoader)
    listed = {ROOT / "docs" / path for path in _leaves(site["nav"])}
    assert listed == {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    train = (ROOT / "docs" / "guides" / "train.md").read_text()
    missing = [config.name for config in (ROOT / "configs").glob("*.py") if config.name not in train]
    assert not missing, "not in docs/guides/train.md"


def _leaves(node):
    if isinstance(node, str):
        return [node]
    return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in _leaves(child)]


def test_shell_is_sound(tmp_path):
    for block in (b for b in BLOCKS if b.language == "sh"):
        (tmp_path / name(block).replace("/", "-")).write_text(synopsis(block))
    result = subprocess.run(
        [tool("shellcheck"), "--shell=bash", *tmp_path.iterdir()], text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout
