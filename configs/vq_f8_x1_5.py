"""x1.5's decoder with a condition branch for the latents of the VQ autoencoder f = 8.

Source: as vq_f8_x2.py, with the sizes and the training of x1_5.py: global batch 32, peak rate 1.44e-4.
Command: asymvq train --config vq_f8_x1_5 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/vq-f8/model.ckpt --out weights/vq_f8
Hardware, time and result: not yet measured; the paper has the KL autoencoder only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/vq_f8_x1_5",
        "--model.decoder_channels=192,384,384,768",
        "--model.decoder_blocks=3",
        "--data.batch_size=32",
    ]
    return load_config(Path(__file__).with_name("vq_f8_x2.py"), changes)
