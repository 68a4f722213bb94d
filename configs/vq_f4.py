"""Latent Diffusion's VQ autoencoder f = 4: 8,192 codes of 3 channels, for a quarter of the picture's sides.

Source: vq-f4 of arXiv 2112.10752's published first stages: the loss, the rate and the number of steps.
Command: asymvq train --config vq_f4 --data.data_dir=gs://bucket/tfds
Data: OpenImages by TFDS as ArrayRecord. Global batch 8, the published batch of a GPU; how many GPUs there were is not
published. The rate, 4.5e-6 x 8 = 3.6e-5, is constant and follows the batch.
Hardware, time and result: not yet measured. Published: R-FID 0.58 and PSNR 27.43 dB on OpenImages' validation pictures.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(directory="runs/vq_f4", train_encoder=True, steps=533_066),
        model=ModelConfig(
            latent_channels=3,
            codebook_size=8_192,
            scaling_factor=1.0,
            encoder_channels=(128, 256, 512),
            decoder_channels=(128, 256, 512),
            condition=False,
            dtype="bfloat16",
        ),
        loss=LossConfig(reduction="mean", gan_start=0, gan_weight=0.75),
        data=DataConfig(source="tfds", path="open_images_v4", min_side=256, batch_size=8, workers=8),
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
    )
