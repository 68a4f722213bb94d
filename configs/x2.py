"""The paper's x2 model: a decoder twice as wide and three blocks a level deeper.

Source: arXiv 2306.04632 and its published training configuration.
Command: asymvq train --config x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Data: ImageNet by TFDS as ArrayRecord, pictures of 256 px and more. Global batch 16 (8 GPUs x 2 in the reference).
Peak rate 4.5e-6 x 16 = 7.2e-5. An epoch of the 1,152,196 pictures is 72,012 steps, and the 150,000 steps are 2.1
    epochs.
Hardware, time and result: not yet measured.
"""

from asymvq_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        # The reference's number of epochs is an argument of its command line and not published; this is ours.
        run=RunConfig(directory="runs/x2", init_from="weights/stable_diffusion", steps=150_000),
        model=ModelConfig(decoder_channels=(256, 512, 1024, 1024), decoder_blocks=5, dtype="bfloat16"),
        data=DataConfig(source="tfds", path="imagenet2012", min_side=256, batch_size=16, workers=8),
        optimizer=OptimizerConfig(pretrained_scale=1.0),
    )
