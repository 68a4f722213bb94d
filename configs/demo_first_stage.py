"""The demo's first stage: a small symmetric autoencoder, whose encoder stands in for Stable Diffusion's.

Command: asymvq train --config demo_first_stage
Hardware: 2 CPU cores. Time and result, for both stages: README.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/demo/first_stage",
            steps=400,
            train_encoder=True,
            log_every=50,
            eval_every=400,
            eval_pictures=16,
            keep=1,
        ),
        model=ModelConfig(
            latent_channels=8,
            norm_groups=2,
            encoder_channels=(16, 32, 64, 64),
            decoder_channels=(16, 32, 64, 64),
            encoder_blocks=1,
            decoder_blocks=1,
            condition=False,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        data=DataConfig(image_size=48, batch_size=8, crop=(0.2, 1.0)),
        optimizer=OptimizerConfig(base_learning_rate=1.25e-4, warmup_steps=20),
    )
