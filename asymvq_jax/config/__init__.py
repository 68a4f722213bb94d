"""What a run is: its fields, and the files and options that set them."""

from asymvq_jax.config.fields import (
    Config,
    DataConfig,
    HarmoniseConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from asymvq_jax.config.loading import Settings, changed, flatten, from_dict, load_config, override, to_json
from asymvq_jax.config.masks import MASK_PRESETS, MaskConfig
from asymvq_jax.config.model import DTYPES, Dtype, ModelConfig
from asymvq_jax.errors import ConfigError, UserError

__all__ = [
    "DTYPES",
    "MASK_PRESETS",
    "Config",
    "ConfigError",
    "DataConfig",
    "Dtype",
    "HarmoniseConfig",
    "LossConfig",
    "MaskConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Settings",
    "UserError",
    "changed",
    "flatten",
    "from_dict",
    "load_config",
    "override",
    "to_json",
]
