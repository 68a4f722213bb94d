"""asymvq-tiny's harmonising decoder: the decoder of configs/tiny.py and a field that sets a fill's tone right.

Command: asymvq train --config tiny_harmonised --data.path=photos/train --data.eval_path=photos/held_out, after
    configs/tiny.py. Only the field is trained, on fills whose tone, blur or grain is off, on clean ones, and on other
    pictures' content, so that colours which are meant survive.
Data: as the first stage's.
Hardware: one thread of a 2-core CPU, 24 pictures/s: 13 minutes.
Result: docs/seam.md.
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
            fit_condition=0,
            train_tone=True,
            steps=4_500,
        ),
        model=dataclasses.replace(base.model, tone_field=True),
        loss=dataclasses.replace(base.loss, squared_weight=0.0),
        # Larger pictures than the decoder's, since tone is a matter of the whole mask; strokes from thin to thick.
        data=dataclasses.replace(
            base.data,
            image_size=256,
            crop=(0.5, 1.0),
            mask=MaskConfig(full_probability=0.0, stroke_count=(1, 12), stroke_length=120, stroke_width=70),
        ),
        optimizer=dataclasses.replace(base.optimizer, base_learning_rate=5e-4, min_learning_rate=2e-5),
        harmonise=HarmoniseConfig(
            probability=0.75, offset=0.25, gradient=0.12, gain=0.2, noise=0.05, edge=1, insert=0.3, insert_flush=0.06,
            halo_weight=1.0,
        ),
    )  # fmt: skip
