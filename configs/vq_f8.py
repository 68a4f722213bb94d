"""Latent Diffusion's VQ autoencoder f = 8: 16,384 codes of 4 channels, with attention at the latent's resolution.

Source: vq-f8 of arXiv 2112.10752's published first stages: the loss, the rate and the number of steps.
Command: asymvq train --config vq_f8 --data.data_dir=gs://bucket/tfds
Data: OpenImages by TFDS as ArrayRecord, resized to a shorter side of 384 px, of which 256 are cropped. Global batch 10,
the published batch of a GPU; how many GPUs there were is not published. The rate, 4.5e-6 x 10 = 4.5e-5, is constant and
follows the batch.
Hardware, time and result: not yet measured. Published: R-FID 1.14 and PSNR 23.07 dB on OpenImages' validation pictures.
"""

from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        run=RunConfig(directory="runs/vq_f8", train_encoder=True, steps=971_043),
        model=ModelConfig(
            latent_channels=4,
            codebook_size=16_384,
            scaling_factor=1.0,
            encoder_channels=(128, 256, 256, 512),
            decoder_channels=(128, 256, 256, 512),
            attention_levels=(3,),
            condition=False,
            dtype="bfloat16",
        ),
        loss=LossConfig(reduction="mean", gan_start=0, gan_weight=0.6, discriminator_layers=2),
        data=DataConfig(
            source="tfds", path="open_images_v4", min_side=256, crop=(256 / 384, 256 / 384), batch_size=10, workers=8
        ),
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
    )
