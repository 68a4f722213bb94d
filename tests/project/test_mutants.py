"""The mutations that the tests must notice: that each still applies, and what the command makes of them."""

import ast
import re

import pytest
from processes import ROOT

from benchmarks import mutants
from benchmarks.mutations import MUTATIONS, Mutation

SOUND = "def double(x):\n    return 2 * x\n"
TEST = "from asymvq_jax.numbers import double\n\n\ndef test_double():\n    assert double({}) == {}\n"


def test_every_mutation_applies_to_code_and_to_tests_that_are_there():
    assert len(MUTATIONS) >= 30
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    stale = [mutation.name for mutation in MUTATIONS if not mutants.applies(mutation, ROOT)]
    assert not stale, "their text does not occur once: adapt benchmarks/mutations.py"
    for mutation in MUTATIONS:
        ast.parse((ROOT / mutation.file).read_text().replace(mutation.old, mutation.new))
        assert mutation.tests
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), test


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Makes a package of one function, and a test of it with one number."""

    def make(number, doubled, *mutations):
        files = {
            "asymvq_jax/__init__": "",
            "asymvq_jax/numbers": SOUND,
            "tests/test_double": TEST.format(number, doubled),
        }
        for name, text in files.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        monkeypatch.setattr(mutants, "ROOT", tmp_path)
        monkeypatch.setattr(mutants, "COPIED", ("asymvq_jax", "tests"))
        monkeypatch.setattr(mutants, "MUTATIONS", mutations)
        return tmp_path / "asymvq_jax" / "numbers.py"

    return make


def _mutation(name, old, new):
    return Mutation(name, "asymvq_jax/numbers.py", old, new, ("tests/test_double.py::test_double",))


def test_killed_and_surviving_mutations(project, capsys):
    file = project(2, 4, _mutation("square", "2 * x", "x * x"), _mutation("triple", "2 * x", "3 * x"))
    assert mutants.main([]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\| square \| .* \| \*\*survived\*\* \|", printed)
    assert re.search(r"\| triple \| .* \| killed \|", printed)
    assert "1 of 2 mutations killed, 1 survived" in printed
    assert file.read_text() == SOUND
    assert mutants.main(["--only", "triple"]) == 0


@pytest.mark.parametrize(
    ("doubled", "old", "arguments", "message"),
    [
        (6, "4 * x", [], "no longer apply, as their text does not occur once: 'triple' (asymvq_jax/numbers.py)"),
        (
            6,
            "2 * x",
            ["--only=other"],
            "--only 'other': expected a part of a mutation's name or file, such as 'triple'",
        ),
        (7, "2 * x", [], "the tests fail without a mutation; run them with pytest first"),
    ],
)
def test_what_cannot_be_tried_is_an_error(project, doubled, old, arguments, message, capsys):
    project(3, doubled, _mutation("triple", old, "3 * x"))
    assert mutants.main(arguments) == 2
    assert message in capsys.readouterr().err
