"""The wheel: that it holds the package and nothing else, installs into an empty environment, and runs from there."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from processes import ROOT

import asymvq_jax

TIMEOUT = 300


def run(*command, **options):
    result = subprocess.run(command, text=True, capture_output=True, timeout=TIMEOUT, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from what a clone has, without the network; setuptools leaves its traces in the copy."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("asymvq_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--disable-pip-version-check", "--wheel-dir", "dist", ".", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_it_holds_the_package_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    meta = {name for name in names if ".dist-info/" in name}
    expected = {f"asymvq_jax/{p.relative_to(ROOT / 'asymvq_jax')}" for p in (ROOT / "asymvq_jax").rglob("*.py")}
    expected |= {f"asymvq_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    models = (ROOT / "asymvq_jax" / "models").rglob("*.safetensors")
    expected |= {f"asymvq_jax/{p.relative_to(ROOT / 'asymvq_jax')}" for p in models}
    assert expected <= names
    assert "asymvq_jax/py.typed" in names
    assert all(name.startswith("asymvq_jax/") for name in names - meta)
    assert any(name.endswith("licenses/LICENSE") for name in meta)


def test_its_description_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "asymvq = asymvq_jax.__main__:run" in archive.read(name).decode()
    assert (metadata["Name"], metadata["Version"]) == ("asymvq-jax", asymvq_jax.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    required = {re.split(r"[><=\[ ;]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra" not in line}
    # PyTorch reads pickles where it is installed, and is required by the tests alone.
    assert {"jax", "flax"} <= required
    assert "torch" not in required
    assert {"demo", "docs", "test", "tpu"} <= set(metadata.get_all("Provides-Extra"))


def test_it_installs_into_an_empty_environment_and_runs(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # What it requires is borrowed from this environment, whose own asymvq_jax is not on that path.
    env = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = tmp_path / "env" / "bin" / "asymvq"
    where = run(python, "-c", "import asymvq_jax; print(asymvq_jax.__file__)", cwd=tmp_path, env=env)
    assert where.startswith(str(tmp_path / "env"))
    assert f"asymvq-jax {asymvq_jax.__version__}" in run(command, "--version", cwd=tmp_path, env=env)
    helped = run(command, "train", "--help", cwd=tmp_path, env=env)
    assert "--config" in helped
    listed = run(python, "-c", "from asymvq_jax.config import load_config; print(load_config('x2').run.directory)",
                 cwd=tmp_path, env=env)  # fmt: skip
    assert listed.strip() == "runs/x2"
