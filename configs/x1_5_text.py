"""x1.5 without the condition branch: a text-to-image decoder for the same encoder.

Source: the published training configuration without condition; all but the branch as in x1_5.py: global batch 32 (8
GPUs x 4), peak rate 1.44e-4.
Command: asymvq train --config x1_5_text --data.data_dir=gs://bucket/tfds, after
    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
Hardware, time and result: not yet measured.
"""

from pathlib import Path

from asymvq_jax.config import Config, load_config


def get_config() -> Config:
    changes = ["--run.directory=runs/x1_5_text", "--model.condition=false"]
    return load_config(Path(__file__).with_name("x1_5.py"), changes)
