"""Decodes latents that another program has saved.

    python examples/decode_latents.py --checkpoint runs/x2 --latents latents.npy --out pictures

In maxdiffusion's generate scripts, save the latents just before `vae_decode` is called with them:

    np.save("latents.npy", np.asarray(jax.device_get(latents), np.float32))

Files of NumPy, safetensors, PyTorch and ComfyUI are read, with channels first or last. Latents are taken as scaled, as
every diffusion model's are, unless the file says otherwise. One file holds one latent or a batch of them. The pictures
are decoded without a condition, as for text-to-image; to keep the pixels outside a mask, use `asymvq inpaint --latent`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from asymvq_jax import inference
from asymvq_jax.convert.convert import read_model
from asymvq_jax.files import images, tensors
from asymvq_jax.inference.latents import understand_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, or anything that `asymvq convert` reads")
    parser.add_argument("--latents", required=True, type=Path, help="a file of latents, or a folder of them")
    parser.add_argument("--out", required=True, type=Path, help="a folder for the pictures")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once; default: %(default)s")
    parser.add_argument("--dtype", help="compute type, such as bfloat16; default: the checkpoint's")
    options = parser.parse_args()

    model = read_model(options.checkpoint, dtype=options.dtype)
    files = [options.latents]
    if options.latents.is_dir():
        files = sorted(file for file in options.latents.iterdir() if file.suffix in tensors.SUFFIXES)
    for file in files:
        stored = tensors.read_latent_file(file)
        # Checks the shape, divides by the scaling factor, and brings channels to the end.
        batch = understand_alone(
            stored.values,
            model.config,
            layout=stored.layout,
            scaled=stored.scaled is not False,
            norm=model.normalization(),
        ).latent
        count = len(batch)
        for begin in range(0, count, options.batch):
            latents = batch[begin : begin + options.batch]
            for index, picture in enumerate(images.to_uint8(inference.decode(model, latents)), begin):
                name = file.stem if count == 1 else f"{file.stem}_{index:04d}"
                images.write(options.out / f"{name}.png", picture)
        print(f"{file}: {count} picture(s)")


if __name__ == "__main__":
    main()
