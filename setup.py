"""Ships the published configurations of configs/ inside the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["asymvq_jax*"]), "asymvq_jax.configs"],
    package_dir={"asymvq_jax.configs": "configs"},
)
