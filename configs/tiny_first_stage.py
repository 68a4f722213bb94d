"""The first stage of asymvq-tiny: a small encoder with its plain decoder, of Stable Diffusion's structure.

Command: python -m asymvq_jax.data.photographs photos --folder PICTURES, then
    asymvq train --config tiny_first_stage --data.path=photos/train --data.eval_path=photos/held_out
Data: 61 photographs, 512 px at the shorter side; every picture is seen about 330 times, each time another crop.
Hardware: one thread of a 2-core CPU, 20 pictures/s when it has the thread alone: 17 minutes (33 with the cores shared).
Result: 29.0 dB mean PSNR on 19 unseen whole photographs of 256 px (31.0 on nine wallpapers, 27.3 on the ten inside
    scikit-image and scikit-learn; the averages of 8 x 8 pixels, interpolated cubically, give 27.4 and 22.8).
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
            # One over the standard deviation of the latents of its training pictures.
            scaling_factor=0.39,
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
