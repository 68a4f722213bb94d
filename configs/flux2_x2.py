"""x2's decoder for the latents of FLUX.2's autoencoder (32 channels).

Source: sizes and patches of the latent are the defaults of diffusers' AutoencoderKLFlux2; the
statistics that normalise the latent are taken over from the checkpoint; the decoder and its training as in x2.py:
global batch 16, peak rate 7.2e-5.
Command: asymvq train --config flux2_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/FLUX.2-dev --out weights/flux2
Hardware, time and result: not yet measured; the paper has Stable Diffusion 1.5 only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/flux2_x2",
        "--run.init_from=weights/flux2",
        "--model.latent_channels=32",
        "--model.scaling_factor=1",
        "--model.latent_patch=2",
        "--model.batch_norm_epsilon=1e-4",
    ]
    return load_config(Path(__file__).with_name("x2.py"), changes)
