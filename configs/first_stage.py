"""A first stage of Stable Diffusion's sizes, for those who have no weights of it: the encoder is trained too.

Source: the KL autoencoder of arXiv 2112.10752 (f = 8, 4 channels), with the losses of this repository.
Command: asymvq train --config first_stage --data.data_dir=gs://bucket/tfds
Hardware, time and result: not yet measured.
"""

from asymvq_jax.config import Config, DataConfig, ModelConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(directory="runs/first_stage", train_encoder=True, steps=150_000),
        model=ModelConfig(condition=False, dtype="bfloat16"),
        data=DataConfig(source="tfds", path="imagenet2012", min_side=256, batch_size=96, workers=8),
    )
