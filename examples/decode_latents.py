"""Decodes latents that another program has saved.

    python examples/decode_latents.py --checkpoint runs/x2 --latents latents.npy --out pictures

In maxdiffusion's generate scripts, save the latents just before `vae_decode` is called with them:

    np.save("latents.npy", np.asarray(jax.device_get(latents), np.float32))

They are scaled, as every diffusion model's are, and have channels first; both layouts are read. One file holds one
latent or a batch of them. The pictures are decoded without a condition, as for text-to-image; to keep the pixels
outside a mask, use `asymvq inpaint --latent`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from asymvq_jax import inference
from asymvq_jax.convert.convert import read_model
from asymvq_jax.files import images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, or anything that `asymvq convert` reads")
    parser.add_argument("--latents", required=True, type=Path, help="a .npy file, or a folder of them")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once; default: %(default)s")
    parser.add_argument("--dtype", help="compute type, such as bfloat16; default: the checkpoint's")
    options = parser.parse_args()

    model = read_model(options.checkpoint, dtype=options.dtype)
    files = sorted(options.latents.glob("*.npy")) if options.latents.is_dir() else [options.latents]
    for file in files:
        array = np.load(file, allow_pickle=False)
        batch = array if array.ndim == 4 else array[None]
        count = len(batch)
        for begin in range(0, count, options.batch):
            part = batch[begin : begin + options.batch]
            size = picture_size(part.shape[1:], model.config.latent_channels, model.config.downsampling)
            # Checks the shape, divides by the scaling factor, and brings channels to the end.
            latents = jnp.concatenate([inference.read_latent(latent, model.config, size) for latent in part])
            for index, picture in enumerate(images.to_uint8(inference.decode(model, latents)), begin):
                name = file.stem if count == 1 else f"{file.stem}_{index:04d}"
                images.write(options.out / f"{name}.png", picture)
        print(f"{file}: {count} picture(s)")


def picture_size(shape: tuple[int, ...], channels: int, downsampling: int) -> tuple[int, int]:
    """Height and width of the picture of one latent, with channels first or last."""
    height, width = shape[1:] if shape[0] == channels else shape[:2]
    return height * downsampling, width * downsampling


if __name__ == "__main__":
    main()
