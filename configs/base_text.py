"""The base model without the condition branch: a text-to-image decoder for the same encoder.

Source: the published training configuration without condition; all but the branch as in base.py: global batch 80 (8
GPUs x 10), peak rate 3.6e-4, of which all parameters take a tenth.
Command: asymvq train --config base_text --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Hardware, time and result: not yet measured.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = ["--run.directory=runs/base_text", "--model.condition=false"]
    return load_config(Path(__file__).with_name("base.py"), changes)
