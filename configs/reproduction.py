"""The paper's comparison at an eighth of the width and a quarter of the size: this file is its first stage.

Command: asymvq benchmark reproduction --photos DIR, which trains this and then every decoder on its frozen encoder
Data: a folder of photographs, some of them held out.
Hardware: 2 CPU cores. Time and result: docs/reproduction.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/reproduction/first_stage",
            steps=1000,
            train_encoder=True,
            log_every=100,
            eval_every=500,
            eval_pictures=48,
            keep=1,
        ),
        # Stable Diffusion's sizes, the widths divided by 8: four channels a group and two blocks a level, as there.
        model=ModelConfig(
            norm_groups=4, encoder_channels=(16, 32, 64, 64), decoder_channels=(16, 32, 64, 64), condition=False
        ),
        # Neither LPIPS nor a GAN: on two cores LPIPS alone would take most of the time.
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        # Few full masks, which teach nothing about copying.
        data=DataConfig(
            source="folder",
            path="photos",
            image_size=64,
            batch_size=8,
            crop=(0.25, 1.0),
            mask=MaskConfig(full_probability=0.1),
        ),
        optimizer=OptimizerConfig(base_learning_rate=2.5e-4, warmup_steps=50),
    )
