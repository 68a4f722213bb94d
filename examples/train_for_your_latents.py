"""Trains an asymmetric decoder for the latents of a diffusion model of your own.

    python examples/train_for_your_latents.py path/to/my-model --photos photos --out runs/mine

The first argument is what has its autoencoder: a diffusers pipeline, an AutoencoderKL or VQModel folder, or an original
checkpoint (then with --scaling-factor, which such a file does not say). The encoder's sizes and the latent's scale are
taken from it, and the decoder's sizes from the config (`x2` by default). Further fields may follow as options. The same
command again resumes the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from asymvq_jax.config import ModelConfig, load_config
from asymvq_jax.convert.convert import convert
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.models.checkpoints import load_parameters
from asymvq_jax.training.loop import train

# What the decoder has of its own.
DECODER = ("decoder_channels", "decoder_blocks", "condition", "dtype", "remat")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a pipeline or autoencoder folder, or an original checkpoint")
    parser.add_argument("--photos", required=True, help="any tree of pictures; the diffusion model's own are best")
    parser.add_argument("--out", required=True, type=Path, help="the run's directory")
    parser.add_argument("--config", default="x2", help="a published config, or a file; default: %(default)s")
    parser.add_argument("--scaling-factor", type=float, help="of an original checkpoint's latent")
    options, fields = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    weights = options.out / "autoencoder"
    if not weights.exists():
        convert(options.source, weights, scaling_factor=options.scaling_factor)
    theirs, _ = load_parameters(weights)
    own = [
        "--data.source=folder",
        f"--data.path={options.photos}",
        f"--run.directory={options.out}",
        f"--run.init_from={weights}",
    ]
    config = load_config(options.config, [*own, *fields])
    config = dataclasses.replace(config, model=for_encoder(theirs, config.model))
    scale = f"scale {theirs.scaling_factor}, shift {theirs.shift_factor}"
    print(f"latents of {theirs.latent_channels} channels, {scale}; decoder {config.model.decoder_channels}")
    keep_compiled_programs()
    return train(config)


def for_encoder(theirs: ModelConfig, decoder: ModelConfig) -> ModelConfig:
    """The encoder and the latent of one model with the decoder of another."""
    return dataclasses.replace(theirs, **{name: getattr(decoder, name) for name in DECODER})


if __name__ == "__main__":
    sys.exit(main())
