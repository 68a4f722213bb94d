"""The paper's comparison at an eighth of the width and a quarter of the size: this file is the base decoder.

Command: asymvq benchmark reproduction, which trains every decoder on the frozen encoder inside the package
Data: the photographs inside other packages, or more by --data.source=folder --data.path=DIR --data.eval_path=DIR.
Hardware: 2 CPU cores. Time and result: docs/reproduction.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/reproduction/base",
            init_from="tiny-plain",
            steps=1_000,
            log_every=100,
            eval_every=1_000,
            eval_pictures=12,
            keep=1,
        ),
        model=ModelConfig(
            latent_channels=8,
            scaling_factor=0.39,
            norm_groups=4,
            encoder_channels=(16, 32, 64, 64),
            decoder_channels=(16, 32, 64, 64),
            encoder_blocks=1,
            decoder_blocks=1,
        ),
        # Neither LPIPS nor a GAN: on two cores LPIPS alone would take most of the time.
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        # Few full masks, which teach nothing about copying.
        data=DataConfig(
            image_size=64, crop=(0.15, 0.5), mirror=0.5, batch_size=4, mask=MaskConfig(full_probability=0.1)
        ),
        optimizer=OptimizerConfig(base_learning_rate=5e-4, warmup_steps=50, min_learning_rate=1e-5),
    )
