"""asymvq-tiny: an asymmetric decoder, one and a half times as wide, on the encoder of configs/tiny_first_stage.py.

Command: asymvq train --config tiny --data.path=photos/train --data.eval_path=photos/held_out,
    after the first stage
Data: as the first stage's.
Hardware: one thread of a 2-core CPU, 14 pictures/s: 24 minutes (38 with the core shared).
Result: on 19 unseen whole photographs of 256 px with a mask each, kept pixels 43.5 dB and 29.2 dB without a mask (plain
    decoder 29.0), as asymvq benchmark embed --measure prints. How the fill looks at the mask's edge: docs/seam.md.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(
            directory="runs/tiny/asymmetric",
            init_from="runs/tiny/first_stage",
            # From the plain decoder's weights; the condition branch begins as what fits that decoder.
            grow_decoder=True,
            fit_condition=40,
            steps=5_000,
            log_every=100,
            eval_every=500,
            eval_pictures=32,
            keep=2,
        ),
        model=ModelConfig(
            latent_channels=8,
            # One over the standard deviation of the latents of its training pictures.
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
            source="folder", path="photos", image_size=64, crop=(0.2, 0.4), mirror=0.5, recolour=0.2, batch_size=4,
            keep_decoded=True, max_corrupt_share=0.0, mask=MaskConfig(full_probability=0.1),
        ),
        optimizer=OptimizerConfig(
            base_learning_rate=7.5e-5, pretrained_scale=0.5, warmup_steps=50, min_learning_rate=1e-5, ema_decay=0.995
        ),
    )  # fmt: skip
