"""asymvq inpaint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype
from asymvq_jax.errors import InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Decode an edited latent so that the picture's unmasked pixels stay."""

    # The original picture: PNG, JPEG, WebP, ...
    image: str
    # A picture of the same size: white = generate, black = preserve.
    mask: str
    # The model: a run, or anything that `asymvq convert` reads.
    checkpoint: str
    # The picture to write: .png, .jpg or .webp.
    out: str
    # An edited latent (.npy) from a diffusion model; by default the picture's own.
    latent: str | None = None
    # The latent has not been multiplied by the scaling factor.
    unscaled_latent: bool = False
    # Greys of the mask blend; without this the threshold is 0.5.
    soft_mask: bool = False
    # model: what the decoder makes. exact: also paste the preserved pixels back.
    keep: Literal["model", "exact"] = "model"
    # How exact sets the fill into the picture. none: up to the mask's edge. feather: with a linear transition around
    # the mask. multiband: octave by octave, and a transition. tone: a smooth tone, fitted along the edge, is added to
    # the fill. poisson: the fill's gradients with the colours around it.
    blend: Literal["none", "feather", "multiband", "tone", "poisson"] = "feather"
    # Width of the transition of feather and multiband, px.
    band: int = 8
    # For a picture that one device's memory cannot hold. strips: in strips of rows on one device, which is slower;
    # devices: its rows split over all devices.
    large: Literal["strips", "devices"] | None = None
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Inpaint) -> None:
    """Inpaints, and prints what was done."""
    from asymvq_jax.convert.convert import read_model
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.files import images
    from asymvq_jax.files.outputs import check_writable
    from asymvq_jax.inference.whole import check_condition, check_mask, inpaint, read_latent

    keep_compiled_programs()
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
        blend=options.blend,
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


def _for_size(large: str | None, rows: int) -> dict[str, Callable[..., Any]]:
    """The functions that `inpaint` encodes and decodes with; `rows` are the latent's."""
    import jax

    from asymvq_jax.devices import sharding
    from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
    from asymvq_jax.inference.whole import decode, encode

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
    import numpy as np

    try:
        latent = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--latent {path} is not a readable .npy file of numbers: {error}") from None
    if not isinstance(latent, np.ndarray) or latent.dtype.kind not in "fiu":
        raise InputError(f"--latent {path}: expected one array of real numbers")
    return latent


main = command("asymvq inpaint", Inpaint, work)
