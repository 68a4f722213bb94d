"""x2's decoder for the latents of Qwen-Image's autoencoder (16 channels).

Source: the defaults of diffusers' AutoencoderKLQwenImage (0.42), whose sizes, means and deviations are those of
Wan 2.1's; the decoder and its training as in x2.py: global batch 16, peak rate 7.2e-5.
Command: asymvq train --config qwen_image_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/Qwen-Image --out weights/qwen_image
Hardware, time and result: not yet measured; the paper has Stable Diffusion 1.5 only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/qwen_image_x2",
        "--run.init_from=weights/qwen_image",
        "--model.encoder_layers=qwen-image",
    ]
    return load_config(Path(__file__).with_name("wan_x2.py"), changes)
