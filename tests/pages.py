"""What the tests read out of the documentation: its pages, their links, and the code and commands in them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from processes import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").glob("*.md"), *ROOT.glob("examples/*.md")]
)
# Where one command of a line of the shell ends and the next begins.
ENDS = {"|", "||", "&&", ";", "&"}


def tool(name: str) -> str:
    """A program that a package of the tests' environment has brought."""
    return str(Path(sys.executable).parent / name)


class Block(NamedTuple):
    """A fenced block: its page and first line, its language, whether a comment above it says "run", and its text."""

    page: Path
    line: int
    language: str
    marked: bool
    text: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, without the indentation that lists give them."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines):
        if not (match := re.match(r"( *)```(\w*)", line)):
            continue
        if begin is None:
            begin, indent, language = number, len(match[1]), match[2]
            continue
        text = "\n".join(inner[indent:] for inner in lines[begin + 1 : number])
        marked = begin > 0 and lines[begin - 1].strip() == "<!-- run -->"
        found.append(Block(page, begin + 1, language, marked, text))
        begin = None
    assert begin is None, f"{page}:{begin}: a block without end"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end with."""
    headings = re.findall(r"(?m)^#+ +(.+?) *$", prose(page))
    words = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings)
    return {re.sub(r"[\s]", "-", text) for text in words}


def commands(script: str) -> Iterator[list[str]]:
    """The words after `asymvq` of every such command in a shell script, also of those inside a quoted argument."""
    script = re.sub(r"\\\n\s*", " ", script)
    for line in script.splitlines():
        if "asymvq" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        yield from _commands(list(lexer))


def _commands(words: list[str]) -> Iterator[list[str]]:
    command: list[str] | None = None
    for word in [*words, ";"]:
        if word in ENDS:
            if command is not None:
                yield command
            command = None
        elif command is not None:
            command.append(word)
        elif word.rpartition("/")[2] == "asymvq":
            command = []
        elif "asymvq " in word:
            yield from commands(word.partition("=")[2] or word)


def inline_commands(page: Path) -> Iterator[list[str]]:
    """The words after `asymvq` of what a page's text has in code font."""
    for text in re.findall(r"`(asymvq [^`]+)`", prose(page)):
        yield shlex.split(" ".join(text.split()))[1:]
