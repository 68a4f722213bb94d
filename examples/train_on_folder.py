"""Trains an asymmetric decoder on a folder of pictures, for a number of passes over it.

    asymvq convert --checkpoint path/to/stable-diffusion-v1-5 --out weights/stable_diffusion
    python examples/train_on_folder.py photos --init-from weights/stable_diffusion --out runs/photos --epochs 10

The number of steps follows from the number of pictures; the rest is the config's (`base` by default: Stable Diffusion's
own decoder with a condition branch). Further fields may follow as options: --data.batch_size=16 --model.dtype=bfloat16.
The same command again resumes the run.
"""

from __future__ import annotations

import argparse
import logging
import sys

from asymvq_jax.config import load_config
from asymvq_jax.data.sources import open_source
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.training.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="any tree of pictures")
    parser.add_argument("--init-from", required=True, help="the model with the frozen encoder")
    parser.add_argument("--out", required=True, help="the run's directory")
    parser.add_argument("--config", default="base", help="a published config, or a file; default: %(default)s")
    parser.add_argument("--epochs", type=float, default=10, help="passes over the pictures; default: %(default)s")
    options, fields = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    own = [
        "--data.source=folder",
        f"--data.path={options.photos}",
        "--data.min_side=0",
        f"--run.directory={options.out}",
        f"--run.init_from={options.init_from}",
    ]
    config = load_config(options.config, [*own, *fields])
    pictures = len(open_source(config.data, train=True))
    steps = max(1, round(options.epochs * pictures / config.data.batch_size))
    # Ten evaluations, a tenth of the steps for the warm-up, and the discriminator for the last half.
    schedule = {
        "run.steps": steps,
        "run.eval_every": max(1, steps // 10),
        "optimizer.warmup_steps": min(config.optimizer.warmup_steps, steps // 10),
        "loss.gan_start": steps // 2,
    }
    config = load_config(options.config, [*own, *(f"--{name}={value}" for name, value in schedule.items()), *fields])
    print(f"{pictures} pictures, {steps} steps of {config.data.batch_size}")
    keep_compiled_programs()
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
