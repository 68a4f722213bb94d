"""Inpaints one picture: python -m asymvq_jax.inpaint --image F --mask F --checkpoint DIR --out F."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from asymvq_jax.commands.entry import command
from asymvq_jax.config import DTYPES
from asymvq_jax.convert.convert import read_model
from asymvq_jax.devices import sharding
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.errors import InputError
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable
from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
from asymvq_jax.inference.whole import check_condition, check_mask, decode, encode, inpaint, read_latent


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.inpaint", description=__doc__)
    parser.add_argument("--image", required=True, help="the original picture (PNG, JPEG, WebP, ...)")
    parser.add_argument("--mask", required=True, help="a picture of the same size: white = generate, black = preserve")
    parser.add_argument(
        "--soft-mask", action="store_true", help="greys of the mask blend; without it the threshold is 0.5"
    )
    parser.add_argument("--checkpoint", required=True, help="a run, or whatever asymvq_jax.convert reads")
    parser.add_argument("--out", required=True, help="the result: .png, .jpg or .webp")
    parser.add_argument("--latent", help="an edited latent (.npy) from a diffusion model; default: the picture's own")
    parser.add_argument("--unscaled-latent", action="store_true", help="the latent is not times the scaling factor")
    parser.add_argument("--keep", choices=("model", "exact"), default="model", help="exact: paste kept pixels back too")
    parser.add_argument("--band", type=int, default=8, help="width of the transition around the mask for exact, px")
    parser.add_argument(
        "--large",
        choices=("strips", "devices"),
        help="a picture that one device's memory cannot hold: in strips of rows on one device (slower), or its rows "
        "split over all devices",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute type; default: the checkpoint's")
    options = parser.parse_args(arguments)
    keep_compiled_programs()
    _run(options)
    return 0


def _run(options: argparse.Namespace) -> None:
    check_writable(options.out, images.FORMATS)
    if options.keep == "exact" and options.out.lower().endswith((".jpg", ".jpeg")):
        raise InputError(f"--out {options.out}: JPEG changes every pixel; --keep exact needs .png or .webp")
    image, mask = images.read(options.image), images.read_mask(options.mask, soft=options.soft_mask)
    check_mask(mask, image)
    latent = None if options.latent is None else _read_npy(options.latent)
    model = read_model(options.checkpoint, dtype=options.dtype)
    check_condition(model.config, f"--checkpoint {options.checkpoint}")
    if latent is not None:
        read_latent(latent, model.config, image.shape[:2])
    begin = time.perf_counter()
    result = inpaint(
        model,
        image,
        mask,
        latent,
        keep=options.keep,
        band=options.band,
        scaled=not options.unscaled_latent,
        **_for_size(options.large, -(-image.shape[0] // model.config.downsampling)),
    )
    images.write(options.out, result.image)
    step = "" if result.tone_step is None else f"; covered a tone step of {result.tone_step:.2f} levels of 255"
    height, width, _ = image.shape
    print(
        f"{options.out}: {width} x {height} px, {mask.mean():.0%} generated, "
        f"{time.perf_counter() - begin:.1f} s with compilation{step}"
    )


def _for_size(large: str | None, rows: int) -> dict[str, Callable]:
    """What `inpaint` is to encode and decode with; `rows` are the latent's."""
    if large is None:
        return {}
    if large == "strips":
        return {"encode": encode_in_strips, "decode": decode_in_strips}
    count = max(n for n in range(1, jax.device_count() + 1) if rows % n == 0)
    if count == 1:
        raise InputError(
            f"--large devices: the latent's {rows} rows cannot be split evenly over any of {jax.device_count()} "
            "devices; use --large strips, or a picture of another height"
        )
    mesh = sharding.make_height_mesh(jax.devices()[:count])
    return {"encode": partial(encode, mesh=mesh), "decode": partial(decode, mesh=mesh)}


def _read_npy(path: str) -> np.ndarray:
    try:
        latent = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--latent {path} is not a readable .npy file of numbers: {error}") from None
    if not isinstance(latent, np.ndarray) or latent.dtype.kind not in "fiu":
        raise InputError(f"--latent {path}: expected one array of real numbers")
    return latent
