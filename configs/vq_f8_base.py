"""The base decoder with a condition branch for the latents of the VQ autoencoder f = 8.

Source: as vq_f8_x2.py, with the sizes and the training of base.py: global batch 80, peak rate 3.6e-4 for the branch, a
tenth of it for the rest.
Command: asymvq train --config vq_f8_base --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/vq-f8/model.ckpt --out weights/vq_f8
Hardware, time and result: not yet measured; the paper has the KL autoencoder only.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = [
        "--run.directory=runs/vq_f8_base",
        "--model.decoder_channels=128,256,256,512",
        "--model.decoder_blocks=2",
        "--data.batch_size=80",
        "--optimizer.pretrained_scale=0.1",
    ]
    return load_config(Path(__file__).with_name("vq_f8_x2.py"), changes)
