"""x2 without the condition branch: a text-to-image decoder for the same encoder.

Source: the published training configuration without condition; all but the branch as in x2.py: global batch 16 (8
GPUs x 2), peak rate 7.2e-5.
Command: asymvq train --config x2_text --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Hardware, time and result: not yet measured.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = ["--run.directory=runs/x2_text", "--model.condition=false"]
    return load_config(Path(__file__).with_name("x2.py"), changes)
