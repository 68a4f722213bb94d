"""Names of modules in release 0.1, which go on working for one release: `python -m asymvq_jax.inpaint`, and imports."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

# Former module -> where it is now.
MODULES = {
    "checkpoints": "training.checkpoints",
    "cluster": "devices.cluster",
    "compilation": "devices.compilation",
    "convert.__main__": "commands.convert",
    "convert.files": "files.weights",
    "demo": "evaluation.page",
    "export": "commands.export",
    "generate": "commands.generate",
    "images": "files.images",
    "inpaint": "commands.inpaint",
    "metrics": "evaluation.metrics",
    "metrics.__main__": "commands.score",
    "metrics.distribution": "evaluation.metrics.distribution",
    "metrics.image": "evaluation.metrics.image",
    "metrics.inception": "evaluation.metrics.inception",
    "metrics.seam": "evaluation.metrics.seam",
    "outputs": "files.outputs",
    "plan.__main__": "commands.plan",
    "plan.generate": "commands.plan_denoising",
    "seam": "evaluation.seam",
    "sharding": "devices.sharding",
    "strips": "inference.strips",
}
# Former command, started as `python -m asymvq_jax.NAME` -> the command that took its place.
COMMANDS = {
    "convert.__main__": "convert",
    "data.build": "build-data",
    "data.masks": "masks",
    "demo": "page",
    "export": "export",
    "generate": "generate",
    "inpaint": "inpaint",
    "metrics.__main__": "score",
    "plan.__main__": "plan",
    "plan.generate": "plan denoising",
    "plan.table": "plan table",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of both tables."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MODULES | COMMANDS:
            return None
        if name in MODULES:
            return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=name == "metrics")
        file = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert file is not None, name
        assert file.origin is not None, name
        return importlib.util.spec_from_file_location(fullname, file.origin, loader=_FileLoader(fullname, file.origin))


class _Loader(importlib.abc.InspectLoader):
    """Imported, a former name is the module that took its place; run by `python -m`, its command."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        sys.modules[module.__name__] = importlib.import_module(f"{__package__}.{MODULES[name]}")

    def get_source(self, fullname: str) -> str:
        return f"from {__package__}.former import run\nrun({fullname.partition('.')[2]!r})\n"

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_source(fullname), fullname, "exec")


class _FileLoader(importlib.machinery.SourceFileLoader):
    """Imported, the module that still has its name; run by `python -m`, its command."""

    def exec_module(self, module: ModuleType) -> None:
        code = super().get_code(module.__name__)
        assert code is not None, module
        exec(code, module.__dict__)

    def get_code(self, fullname: str) -> CodeType:
        return _Loader().get_code(fullname)


def run(name: str) -> None:
    """Runs the command that took the place of `python -m asymvq_jax.NAME`, and says so."""
    from asymvq_jax.__main__ import main
    from asymvq_jax.commands.entry import leave

    words = COMMANDS[name].split()
    former = name.removesuffix(".__main__")
    print(f"note: python -m {__package__}.{former} is now: asymvq {' '.join(words)}", file=sys.stderr)
    # A module without a file has none here, and JAX reads the command line for XLA's flags.
    sys.argv[0] = sys.argv[0] or name
    leave(main([*words, *sys.argv[1:]]))


class _Package(ModuleType):
    """This package, whose function `inpaint` is not hidden by an import of the former module of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "inpaint" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def install() -> None:
    """Lets `import` find the former names, before it looks for files."""
    sys.meta_path.insert(0, _Finder())
    sys.modules[__package__].__class__ = _Package
