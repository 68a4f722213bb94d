"""asymvq-tiny's harmonising decoder: goes on from configs/tiny.py with fills whose tone, blur or grain is off.

Command: asymvq train --config tiny_harmonised --data.path=FOLDER --data.eval_path=HELD_OUT, after
configs/tiny.py. Half of the samples stay clean, so that colours which are meant survive.
Data: as the first stage's.
Hardware: 1 CPU core. Result: asymvq_jax/models/tiny/README.md.
"""

import dataclasses
from pathlib import Path

from asymvq_jax.config import Config, HarmoniseConfig, MaskConfig, load_config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("tiny.py"))
    return dataclasses.replace(
        base,
        run=dataclasses.replace(
            base.run,
            directory="runs/tiny/harmonised",
            init_from="runs/tiny/asymmetric",
            grow_decoder=False,
            steps=2_500,
        ),
        data=dataclasses.replace(base.data, mask=MaskConfig(full_probability=0.02)),
        optimizer=dataclasses.replace(
            base.optimizer, base_learning_rate=5e-5, pretrained_scale=1.0, min_learning_rate=5e-6
        ),
        harmonise=HarmoniseConfig(probability=0.5, halo_weight=1.0),
    )
