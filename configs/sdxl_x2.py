"""x2's decoder for the latents of Stable Diffusion XL's autoencoder (4 channels).

Source: sizes, scale of the latent from its published vae/config.json; the decoder and its training as in
x2.py: global batch 16, peak rate 7.2e-5.
Command: asymvq train --config sdxl_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-xl-base-1.0 --out weights/sdxl
Hardware, time and result: not yet measured; the paper has Stable Diffusion 1.5 only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/sdxl_x2",
        "--run.init_from=weights/sdxl",
        "--model.scaling_factor=0.13025",
    ]
    return load_config(Path(__file__).with_name("x2.py"), changes)
