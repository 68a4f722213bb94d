"""The asymmetric VQGAN for Stable Diffusion (arXiv 2306.04632) in JAX.

    import asymvq_jax

    model = asymvq_jax.load_model("runs/x2")
    result = asymvq_jax.inpaint(model, image, mask)

What `dir(asymvq_jax)` lists is the public interface. Importing this module imports nothing slow: each name is looked up
in its own module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from asymvq_jax import former

if TYPE_CHECKING:
    from asymvq_jax.config import Config as Config
    from asymvq_jax.config import DataConfig as DataConfig
    from asymvq_jax.config import LossConfig as LossConfig
    from asymvq_jax.config import MaskConfig as MaskConfig
    from asymvq_jax.config import MeshConfig as MeshConfig
    from asymvq_jax.config import ModelConfig as ModelConfig
    from asymvq_jax.config import OptimizerConfig as OptimizerConfig
    from asymvq_jax.config import RunConfig as RunConfig
    from asymvq_jax.config import load_config as load_config
    from asymvq_jax.convert.convert import convert as convert
    from asymvq_jax.convert.convert import read_model as load_model  # noqa: F401
    from asymvq_jax.errors import UserError as UserError
    from asymvq_jax.inference import Crop as Crop
    from asymvq_jax.inference import InpaintResult as InpaintResult
    from asymvq_jax.inference import decode as decode
    from asymvq_jax.inference import denormalize_latent as denormalize_latent
    from asymvq_jax.inference import encode as encode
    from asymvq_jax.inference import inpaint as inpaint
    from asymvq_jax.inference import normalize_latent as normalize_latent
    from asymvq_jax.models.autoencoder import Autoencoder as Autoencoder
    from asymvq_jax.models.checkpoints import save_model as save_model
    from asymvq_jax.training.loop import train as train

__version__ = "0.2.0"

# Each public name's module, and the name there.
_HOMES = {
    "Autoencoder": ("models.autoencoder", "Autoencoder"),
    "Config": ("config", "Config"),
    "Crop": ("inference", "Crop"),
    "DataConfig": ("config", "DataConfig"),
    "InpaintResult": ("inference", "InpaintResult"),
    "LossConfig": ("config", "LossConfig"),
    "MaskConfig": ("config", "MaskConfig"),
    "MeshConfig": ("config", "MeshConfig"),
    "ModelConfig": ("config", "ModelConfig"),
    "OptimizerConfig": ("config", "OptimizerConfig"),
    "RunConfig": ("config", "RunConfig"),
    "UserError": ("errors", "UserError"),
    "decode": ("inference", "decode"),
    "denormalize_latent": ("inference", "denormalize_latent"),
    "encode": ("inference", "encode"),
    "inpaint": ("inference", "inpaint"),
    "load_config": ("config", "load_config"),
    "load_model": ("convert.convert", "read_model"),
    "normalize_latent": ("inference", "normalize_latent"),
    "save_model": ("models.checkpoints", "save_model"),
    "train": ("training.loop", "train"),
}
# The package `convert` can itself be called.
__all__ = sorted([*_HOMES, "convert"])


def __getattr__(name: str) -> Any:
    if name == "convert":
        return importlib.import_module("asymvq_jax.convert")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__


former.install()
