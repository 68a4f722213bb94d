"""The paper's base model: Stable Diffusion's decoder plus the condition branch.

Source: arXiv 2306.04632 and its published training configuration.
Command: asymvq train --config base --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Data: ImageNet by TFDS as ArrayRecord, pictures of 256 px and more. Global batch 80 (8 GPUs x 10 in the reference).
Peak rate 4.5e-6 x 80 = 3.6e-4, a tenth of it for what starts pretrained. An epoch of the 1,152,196 pictures is 14,402
    steps, and the 150,000 steps are 10.4 epochs.
Hardware, time and result: not yet measured.
"""

from asymvq_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        # The reference's number of epochs is an argument of its command line and not published; this is ours.
        run=RunConfig(directory="runs/base", init_from="weights/stable_diffusion", steps=150_000),
        model=ModelConfig(decoder_channels=(128, 256, 512, 512), decoder_blocks=2, dtype="bfloat16"),
        data=DataConfig(source="tfds", path="imagenet2012", min_side=256, batch_size=80, workers=8),
        optimizer=OptimizerConfig(pretrained_scale=0.1),
    )
