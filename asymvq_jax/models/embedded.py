"""The small models inside the package: one frozen encoder with three decoders, as float16 safetensors.

`tiny` harmonises, `tiny-paper` is the asymmetric decoder as published, `tiny-plain` the decoder that came with the
encoder. models/tiny/README.md says what they were trained on and what they can do; `python -m benchmarks.embed` writes
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from asymvq_jax import config as configs
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import CheckpointError
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import Params, split

# Is called with a model's configuration as soon as that is known.
Known = Callable[[ModelConfig], None]

FOLDER = Path(__file__).parent / "tiny"
ENCODER = "encoder.safetensors"
# Name of a model -> file of its decoder.
MODELS = {"tiny": "harmonised.safetensors", "tiny-paper": "paper.safetensors", "tiny-plain": "plain.safetensors"}


def is_embedded(source: str | Path) -> bool:
    """Whether `source` names one of these models, rather than something on disk."""
    return str(source) in MODELS and not Path(source).exists()


def ignore(config: ModelConfig) -> None:
    """Does nothing with a configuration that has become known."""


def embedded_parameters(name: str, folder: Path = FOLDER, known: Known = ignore) -> tuple[ModelConfig, Params]:
    """The configuration and the float32 parameters, on the first local device.

    Raises:
        CheckpointError: the installed package lacks the model's files.
    """
    values: dict[str, np.ndarray] = {}
    stored: dict[str, str] = {}
    for file in (folder / ENCODER, folder / MODELS[name]):
        if not file.is_file():
            raise CheckpointError(f"the model {name!r} needs {file}, which is not there; install asymvq-jax again")
        with safe_open(file, "np") as tensors:
            stored |= tensors.metadata() or {}
            values |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    config: ModelConfig = configs.from_dict(ModelConfig, json.loads(stored["config"]), "model.")
    known(config)
    device = jax.local_devices()[0]
    return config, {key: jax.device_put(value.astype(np.float32), device) for key, value in values.items()}


def write_embedded(models: dict[str, Autoencoder], folder: Path = FOLDER) -> int:
    """Writes the files of `MODELS`.

    Args:
        models: by name; all have the same encoder, bit for bit.
        folder: where to.

    Returns:
        Their size in bytes.

    Raises:
        CheckpointError: the encoders differ.
    """
    parts = {name: _halves(model) for name, model in models.items()}
    first = next(iter(parts))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (encoder, decoder) in parts.items():
        other = parts[first][0]
        if encoder.keys() != other.keys() or any(not np.array_equal(encoder[key], other[key]) for key in encoder):
            raise CheckpointError(f"the encoders of {first!r} and {name!r} differ; the embedded models share one")
        save_file(encoder, folder / ENCODER)
        save_file(decoder, folder / MODELS[name], {"config": configs.to_json(models[name].config)})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _halves(model: Autoencoder) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The parameters in float16: those around the latent and of the encoder, and the decoder's."""
    halves: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for name, value in split(model)[1].items():
        halves[name.startswith("decoder.")][name] = np.asarray(jnp.asarray(value, jnp.float16))
    return halves
