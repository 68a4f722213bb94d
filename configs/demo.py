"""The demo: an asymmetric decoder on the frozen encoder inside the package, from the photographs inside other packages.

Command: make demo, or asymvq train --config demo
Hardware: 2 CPU cores. Time and result: README.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/demo/asymmetric",
            # As the paper starts from Stable Diffusion: the encoder stays, its decoder is widened and goes on.
            init_from="tiny-plain",
            grow_decoder=True,
            fit_condition=20,
            steps=1_000,
            log_every=50,
            eval_every=500,
            eval_pictures=16,
            keep=1,
        ),
        model=ModelConfig(
            latent_channels=8,
            scaling_factor=0.39,
            norm_groups=4,
            encoder_channels=(16, 32, 64, 64),
            decoder_channels=(24, 48, 96, 96),
            encoder_blocks=1,
            decoder_blocks=1,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, squared_weight=5.0),
        # Few full masks, which teach nothing about copying.
        data=DataConfig(
            image_size=64, crop=(0.15, 0.4), mirror=0.5, recolour=0.2, batch_size=4,
            mask=MaskConfig(full_probability=0.1),
        ),
        optimizer=OptimizerConfig(
            base_learning_rate=7.5e-5, pretrained_scale=0.5, warmup_steps=50, min_learning_rate=1e-5, ema_decay=0.99
        ),
    )  # fmt: skip
