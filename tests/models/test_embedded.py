"""Models inside the package: written from others, and read by name."""

import jax
import numpy as np
import pytest
from flax import nnx

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import CheckpointError
from asymvq_jax.models import embedded
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.embedded import embedded_parameters, is_embedded, write_embedded
from asymvq_jax.models.parameters import merge, split

SIZES = {
    "latent_channels": 2, "norm_groups": 2, "encoder_channels": (4, 4), "encoder_blocks": 1, "decoder_blocks": 1,
    "mid_attention": False,
}  # fmt: skip


def _models(seed: int = 0) -> dict[str, Autoencoder]:
    """A plain model, and two asymmetric ones with its encoder."""
    plain = Autoencoder(ModelConfig(decoder_channels=(4, 4), condition=False, **SIZES), rngs=nnx.Rngs(seed))
    shared = {k: v for k, v in split(plain)[1].items() if not k.startswith("decoder.")}
    models = {"tiny-plain": plain}
    for name in ("tiny-paper", "tiny"):
        seed += 1
        model = Autoencoder(ModelConfig(decoder_channels=(6, 8), **SIZES), rngs=nnx.Rngs(seed))
        graphdef, params = split(model)
        models[name] = merge(graphdef, {**params, **shared})
    return models


def test_models_come_back_in_half_precision(tmp_path):
    models = _models()
    size = write_embedded(models, tmp_path)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    for name, model in models.items():
        config, params = embedded_parameters(name, tmp_path)
        assert config == model.config
        expected = split(model)[1]
        assert params.keys() == expected.keys()
        for key, value in params.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, np.asarray(expected[key]).astype(np.float16))


def test_another_encoder_is_refused(tmp_path):
    models = _models() | {"tiny": _models(seed=5)["tiny"]}
    with pytest.raises(CheckpointError, match=r"encoders of 'tiny-plain' and 'tiny' differ"):
        write_embedded(models, tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs .*encoder\.safetensors.*install asymvq-jax again"):
        embedded_parameters("tiny", tmp_path)


def test_a_directory_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_embedded("tiny")
    assert not is_embedded("runs/tiny")
    (tmp_path / "tiny").mkdir()
    assert not is_embedded("tiny")


def test_the_package_holds_every_model():
    if not embedded.FOLDER.is_dir():
        pytest.skip("not trained yet")
    parameters = {name: embedded_parameters(name) for name in embedded.MODELS}
    encoders = [{k: v for k, v in p.items() if not k.startswith("decoder.")} for _, p in parameters.values()]
    assert all(jax.tree.all(jax.tree.map(np.array_equal, encoders[0], other)) for other in encoders)
