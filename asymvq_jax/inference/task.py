"""Inpaints one picture's file: what the command does, with its checks in the order of what they cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, Literal

import jax

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import as_told, read_model
from asymvq_jax.devices import sharding
from asymvq_jax.errors import InputError
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.masks import Channel, Mask, load_mask, turned
from asymvq_jax.files.outputs import check_not_input, check_writable, write_bytes
from asymvq_jax.files.pictures import FORMATS, Picture, check_fits, read_file, read_picture, read_size, write_picture
from asymvq_jax.files.tensors import LatentFile, read_latent_file
from asymvq_jax.inference.ahead import compile_ahead
from asymvq_jax.inference.blend import BAND, Blend, check_blend
from asymvq_jax.inference.inpainting import Keep, inpaint_picture
from asymvq_jax.inference.latents import Layout, check_latent
from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
from asymvq_jax.inference.whole import check_condition, decode, encode

log = logging.getLogger(__name__)

Large = Literal["strips", "devices"]


@dataclass(frozen=True)
class Task:
    """One picture to inpaint.

    Attributes:
        image: the original picture's file.
        mask: a picture of the same size.
        checkpoint: of the autoencoder, of any kind that is read.
        out: the file to write.
        latent: an edited latent's file; None: the picture's own latent.
        latent_layout: the latent's; None: found.
        latent_scaled: whether it is times the scaling factor; None: found.
        soft_mask: whether the mask's greys blend.
        mask_channel: what of the mask's file is the mask; None: found.
        invert_mask: whether black is to be generated.
        keep, blend, band: see `inpainting.inpaint`.
        large: how a picture is decoded that one device's memory cannot hold; such pictures are also read.
        scaling_factor, shift_factor: how a diffusion model scales the latents; None: the checkpoint's file says it.
        dtype: the compute type; None: the checkpoint's.
    """

    image: str
    mask: str
    checkpoint: str
    out: str
    latent: str | None = None
    latent_layout: Layout | None = None
    latent_scaled: bool | None = None
    soft_mask: bool = False
    mask_channel: Channel | None = None
    invert_mask: bool = False
    keep: Keep = "model"
    blend: Blend = "feather"
    band: int = BAND
    large: Large | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    dtype: Any = None


def run(task: Task) -> str:
    """Inpaints and writes a picture; what is worth knowing goes to the log.

    Returns:
        What was done, in one line.

    Raises:
        UserError: files or options that do not fit; before the model is run, if it can be known then.
    """
    _check_options(task)
    picture, mask = _read(task)
    latent = None if task.latent is None else read_latent_file(task.latent)
    if warning := mask.warning(task.mask):
        log.warning("%s", warning)
    if mask.empty:
        _give_back(task, picture)
        return f"{task.out}: {picture.size[1]} x {picture.size[0]} px, {mask.describe()}: the picture as it was"
    programs: dict[str, Callable[..., Any]] = {}

    def known(config: ModelConfig) -> None:
        if task.large is None:
            programs.update(compile_ahead(config, picture.size, encodes=latent is None))

    model = read_model(task.checkpoint, as_told(task.scaling_factor, task.shift_factor), dtype=task.dtype, known=known)
    if task.keep == "model":
        check_condition(model.config, f"--checkpoint {task.checkpoint}")
    if latent is not None:
        check_latent(latent.values, model.config, picture.size, task.latent_layout)
    begin = time.perf_counter()
    done = inpaint_picture(
        model,
        picture,
        mask.values.astype("float32"),
        None if latent is None else latent.values,
        keep=task.keep,
        blend=task.blend,
        band=task.band,
        layout=task.latent_layout,
        scaled=_told_scale(task, latent),
        **(programs or _for_size(task.large, -(-picture.size[0] // model.config.downsampling))),
    )
    if done.reading is not None:
        log.info("%s", done.reading.describe())
        if done.reading.warning:
            log.warning("warning: %s", done.reading.warning)
    for lost in write_picture(task.out, done.picture):
        log.warning("warning: %s", lost)
    step = "" if done.tone_step is None else f"; covered a tone step of {done.tone_step:.2f} levels of 255"
    height, width = picture.size
    return (
        f"{task.out}: {width} x {height} px, {mask.describe()}, "
        f"{time.perf_counter() - begin:.1f} s with compilation{step}"
    )


def _check_options(task: Task) -> None:
    """What is known without reading a pixel."""
    check_not_input("--out", task.out, {"--image": task.image, "--mask": task.mask, "--latent": task.latent})
    check_writable(task.out, FORMATS)
    check_blend(task.blend, task.band)
    if task.keep == "exact" and FORMATS[PurePath(task.out).suffix.lower()] == "JPEG":
        raise InputError(f"--out {task.out}: JPEG changes every pixel; --keep exact needs .png or .webp")
    if task.latent is None and (task.latent_layout is not None or task.latent_scaled is not None):
        raise InputError(
            "--latent-layout, --scaled-latent and --unscaled-latent describe --latent, which is missing; name it too"
        )
    size = read_size(task.image, large=task.large is not None)
    check_fits(task.out, size)


def _read(task: Task) -> tuple[Picture, Mask]:
    large = task.large is not None
    picture = read_picture(task.image, large=large)
    for note in picture.notes:
        log.warning("warning: %s: %s", task.image, note)
    mask = load_mask(task.mask, soft=task.soft_mask, channel=task.mask_channel, invert=task.invert_mask, large=large)
    if mask.size != picture.size:
        (h, w), (ih, iw) = mask.size, picture.size
        raise InputError(
            f"the mask is {w} x {h} px and the picture {iw} x {ih} px; they must have the same size"
            + turned(mask.size, picture.size)
        )
    return picture, mask


def _told_scale(task: Task, latent: LatentFile | None) -> bool | None:
    if task.latent_scaled is not None or latent is None:
        return task.latent_scaled
    return latent.scaled


def _give_back(task: Task, picture: Picture) -> None:
    """Writes the picture as it was: the file's own bytes where the format is the same."""
    data = read_file(task.image)
    kind = FORMATS[PurePath(task.out).suffix.lower()]
    if (picture_format(data[:HEAD]) or "").upper() == kind:
        write_bytes(task.out, data)
        return
    for lost in write_picture(task.out, picture):
        log.warning("warning: %s", lost)


def _for_size(large: Large | None, rows: int) -> dict[str, Callable[..., Any]]:
    """What `inpaint_picture` is to encode and decode with; `rows` are the latent's."""
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
