"""The first stage of asymvq-tiny: a small encoder with its plain decoder, of Stable Diffusion's structure.

Command: python train.py --config configs/tiny_first_stage.py --data.path=FOLDER --data.eval_path=HELD_OUT
Data: a folder of photographs, of about 512 px a side so that they are read fast.
Hardware: 1 CPU core. Time and result: not yet measured.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/tiny/first_stage",
            train_encoder=True,
            initialization="wavelet",
            steps=5_000,
            log_every=100,
            eval_every=1_000,
            eval_pictures=32,
            keep=2,
        ),
        model=ModelConfig(
            latent_channels=8,
            norm_groups=4,
            encoder_channels=(16, 32, 64, 64),
            decoder_channels=(16, 32, 64, 64),
            encoder_blocks=1,
            decoder_blocks=1,
            condition=False,
        ),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, squared_weight=5.0),
        # About a quarter of the shorter side: the scale at which whole photographs of 256 px are seen.
        data=DataConfig(
            source="folder", path="photos", image_size=64, crop=(0.2, 0.4), mirror=0.5, recolour=0.2, batch_size=4,
            keep_decoded=True, max_corrupt_share=0.0,
        ),
        optimizer=OptimizerConfig(base_learning_rate=5e-5, warmup_steps=50, min_learning_rate=1e-5, ema_decay=0.995),
    )  # fmt: skip
