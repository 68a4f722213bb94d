"""x2's decoder with a condition branch for the latents of the VQ autoencoder f = 8.

Source: the frozen encoder and codebook of vq_f8.py, a decoder twice as wide and three blocks a level deeper, trained as
x2.py: global batch 16, peak rate 7.2e-5.
Command: asymvq train --config vq_f8_x2 --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/vq-f8/model.ckpt --out weights/vq_f8
    (or with --run.init_from=runs/vq_f8). Without the condition branch: --model.condition=false
Hardware, time and result: not yet measured; the paper has the KL autoencoder only.
"""

import dataclasses
from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    x2, vq_f8 = (load_config(Path(__file__).with_name(name)) for name in ("x2.py", "vq_f8.py"))
    return dataclasses.replace(
        x2,
        run=dataclasses.replace(x2.run, directory="runs/vq_f8_x2", init_from="weights/vq_f8"),
        model=dataclasses.replace(
            vq_f8.model, decoder_channels=(256, 512, 512, 1024), decoder_blocks=5, condition=True
        ),
    )
