"""The demo: an asymmetric decoder, wider than the frozen encoder, on the photographs inside installed packages.

Command: make demo, or asymvq train --config demo after configs/demo_first_stage.py
Hardware: 2 CPU cores. Time and result, for both stages: README.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/demo/asymmetric",
            init_from="runs/demo/first_stage",
            steps=1300,
            log_every=50,
            eval_every=650,
            eval_pictures=16,
            keep=1,
        ),
        model=ModelConfig(
            latent_channels=8,
            norm_groups=2,
            encoder_channels=(16, 32, 64, 64),
            decoder_channels=(32, 64, 96, 96),
            encoder_blocks=1,
            decoder_blocks=1,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.25),
        # Few full masks, which teach nothing about copying, and a fast condition branch: the demo has minutes.
        data=DataConfig(image_size=48, batch_size=2, crop=(0.2, 1.0), mask=MaskConfig(full_probability=0.1)),
        optimizer=OptimizerConfig(base_learning_rate=2e-3, pretrained_scale=0.4, warmup_steps=20),
    )
