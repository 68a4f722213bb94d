"""Names of modules in release 0.1, which go on working for one release: `python -m asymvq_jax.inpaint`, and imports."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

# Former module -> where it is now.
MODULES = {
    "checkpoints": "training.checkpoints",
    "cluster": "devices.cluster",
    "compilation": "devices.compilation",
    "convert.files": "files.weights",
    "images": "files.images",
    "metrics": "evaluation.metrics",
    "metrics.distribution": "evaluation.metrics.distribution",
    "metrics.image": "evaluation.metrics.image",
    "metrics.inception": "evaluation.metrics.inception",
    "metrics.seam": "evaluation.metrics.seam",
    "outputs": "files.outputs",
    "seam": "evaluation.seam",
    "sharding": "devices.sharding",
    "strips": "inference.strips",
}
# Former command, started as `python -m asymvq_jax.NAME` -> the module with its `main`.
COMMANDS = {
    "convert.__main__": "commands.convert",
    "demo": "commands.page",
    "export": "commands.export",
    "generate": "commands.generate",
    "inpaint": "commands.inpaint",
    "metrics.__main__": "commands.score",
    "plan.__main__": "commands.plan",
    "plan.generate": "commands.plan_generate",
    "plan.table": "commands.plan_table",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of both tables."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MODULES | COMMANDS:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=name == "metrics")


class _Loader(importlib.abc.InspectLoader):
    """Imported, a former name is the module that took its place; run by `python -m`, its command."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        sys.modules[module.__name__] = importlib.import_module(f"{__package__}.{(MODULES | COMMANDS)[name]}")

    def get_source(self, fullname: str) -> str:
        return f"from {__package__}.former import run\nrun({COMMANDS[fullname.partition('.')[2]]!r})\n"

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_source(fullname), fullname, "exec")


def run(module: str) -> None:
    """Runs the `main` of a module of this package as a command."""
    from asymvq_jax.commands.entry import leave

    leave(importlib.import_module(f"{__package__}.{module}").main())


def install() -> None:
    """Lets `import` find the former names, before it looks for files."""
    sys.meta_path.insert(0, _Finder())
