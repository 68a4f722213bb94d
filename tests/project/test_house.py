"""The house rules: short files and functions, imports that go downwards, and private names that stay at home."""

import ast
import functools
import re

import pytest
from processes import ROOT

LONGEST_FILE, LONGEST_FUNCTION = 500, 80
# The rooms of the package from the ground up. A room imports from its own floor and from those below.
FLOORS = (
    ("errors",),
    ("config",),
    ("devices", "files"),
    ("models",),
    ("convert",),
    ("losses",),
    ("data",),
    ("training",),
    ("inference",),
    ("diffusion", "evaluation"),
    ("plan",),
    ("commands",),
    ("__main__", "former", ""),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in files("asymvq_jax", "benchmarks")}


def imported(path):
    """(module, name or None, line) of every import in a file, also of those inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None, node.lineno) if full in MODULES else (node.module, alias.name, node.lineno)


def room(name):
    return [*name.split("."), ""][1]


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES if name.startswith("asymvq_jax")} == set(FLOOR)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files("asymvq_jax")}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_short():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in files("asymvq_jax")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_imports_go_downwards():
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("asymvq_jax")
        for name, _, line in imported(path)
        if name.partition(".")[0] == "asymvq_jax" and FLOOR[room(name)] > FLOOR[room(module(path))]
        # The package's own name, such as for its version, brings nothing with it.
        if name != "asymvq_jax"
    ]
    assert not upward


def test_no_circle_of_imports():
    graph = {
        name: {target for target, _, _ in imported(path) if target in MODULES and target != "asymvq_jax"}
        for name, path in MODULES.items()
        if name not in ("asymvq_jax", "asymvq_jax.former")
    }
    # A package's module imports what the package exports.
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("folder", ["asymvq_jax", "benchmarks"])
def test_private_names_stay_at_home(folder):
    """A name with one leading underscore is used in its own module only, as are names in calls such as a mock's."""
    offences = []
    for path in files(folder):
        names = {}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names |= {a.asname or a.name: a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
                offences += [
                    f"{path.relative_to(ROOT)}:{node.lineno} {a.name}"
                    for a in node.names
                    if re.match(r"_[^_]", a.name) and node.module.startswith("asymvq_jax")
                ]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and re.match(r"_[^_]", node.attr):
                owner = names.get(node.value.id, "")
                if owner in MODULES or owner.startswith("asymvq_jax"):
                    offences.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value.id}.{node.attr}")
        for node in ast.walk(tree(path)):
            # As mocks name them.
            if isinstance(node, ast.Call) and any(
                isinstance(a, ast.Constant) and isinstance(a.value, str) and re.fullmatch(r"_[a-z]\w+", a.value)
                for a in node.args[1:2]
            ):
                offences.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not offences


def test_benchmarks_do_not_need_the_tests():
    assert not [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files("asymvq_jax", "benchmarks")
        for name, _, line in imported(path)
        if name.partition(".")[0] in ("tests", "oracles", "conftest")
    ]


def test_modules_inside_traces_have_fast_keys():
    """See `seeded`."""
    slow = re.compile(r"eval_shape\(\s*lambda[^:\n]*:[^\n]*nnx\.Rngs\(")
    assert not [path for path in files("asymvq_jax", "benchmarks", "tests") if slow.search(path.read_text())]


def test_programs_return_no_parameters():
    """As those of nnx.jit do unless told otherwise: see `jitted`."""
    found = [
        path
        for path in files("asymvq_jax", "benchmarks")
        if "nnx.jit(" in path.read_text() or "@nnx.jit" in path.read_text()
    ]
    assert found == [MODULES["asymvq_jax.models.parameters"]]
