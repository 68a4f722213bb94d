"""The paper's x1.5 model: a decoder half as wide again and one block a level deeper.

Source: arXiv 2306.04632 and its published training configuration.
Command: asymvq train --config x1_5 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Data: ImageNet by TFDS as ArrayRecord, pictures of 256 px and more. Global batch 32 (8 GPUs x 4 in the reference).
Peak rate 4.5e-6 x 32 = 1.44e-4. An epoch of the 1,152,196 pictures is 36,006 steps, and the 150,000 steps are 4.2
    epochs.
Hardware, time and result: not yet measured.
"""

from asymvq_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        # The reference's number of epochs is an argument of its command line and not published; this is ours.
        run=RunConfig(directory="runs/x1_5", init_from="weights/stable_diffusion", steps=150_000),
        model=ModelConfig(decoder_channels=(192, 384, 768, 768), decoder_blocks=3, dtype="bfloat16"),
        data=DataConfig(source="tfds", path="imagenet2012", min_side=256, batch_size=32, workers=8),
        optimizer=OptimizerConfig(pretrained_scale=1.0),
    )
