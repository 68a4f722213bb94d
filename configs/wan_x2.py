"""x2's decoder for the latents that the autoencoder of Wan 2.1 gives pictures (16 channels).

Source: sizes, means and deviations of the latent are the defaults of diffusers' AutoencoderKLWan (0.42);
the decoder and its training as in x2.py: global batch 16, peak rate 7.2e-5.
Command: asymvq train --config wan_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/Wan2.1-T2V-1.3B-Diffusers --out weights/wan
Hardware, time and result: not yet measured; the paper has Stable Diffusion 1.5 only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config

MEAN = (
    "-0.7571,-0.7089,-0.9113,0.1075,-0.1745,0.9653,-0.1517,1.5508,"
    "0.4134,-0.0715,0.5517,-0.3632,-0.1922,-0.9497,0.2503,-0.2921"
)
STD = "2.8184,1.4541,2.3275,2.6558,1.2196,1.7708,2.6052,2.0743,3.2687,2.1526,2.8652,1.5579,1.6382,1.1253,2.8251,1.9160"


def get_config() -> Config:
    changes = [
        "--run.directory=runs/wan_x2",
        "--run.init_from=weights/wan",
        "--model.encoder_layers=wan",
        "--model.encoder_channels=96,192,384,384",
        "--model.temporal_levels=1,2",
        "--model.latent_channels=16",
        "--model.scaling_factor=1",
        f"--model.latent_mean={MEAN}",
        f"--model.latent_std={STD}",
    ]
    return load_config(Path(__file__).with_name("x2.py"), changes)
