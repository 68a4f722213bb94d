"""x2's decoder for the latents of Stable Diffusion 3's autoencoder (16 channels).

Source: sizes, scale and shift of the latent from its published vae/config.json; the decoder and its training as in
x2.py: global batch 16, peak rate 7.2e-5.
Command: asymvq train --config sd3_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-3-medium-diffusers --out weights/sd3
Hardware, time and result: not yet measured; the paper has Stable Diffusion 1.5 only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/sd3_x2",
        "--run.init_from=weights/sd3",
        "--model.latent_channels=16",
        "--model.scaling_factor=1.5305",
        "--model.shift_factor=0.0609",
        "--model.quant_conv=false",
    ]
    return load_config(Path(__file__).with_name("x2.py"), changes)
