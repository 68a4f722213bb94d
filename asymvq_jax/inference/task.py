"""Inpaints one picture's file: what the command does, with its checks in the order of what they cost."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any, Literal

import jax

from asymvq_jax.config import ModelConfig
from asymvq_jax.convert.convert import given_factors, read_model
from asymvq_jax.devices import sharding
from asymvq_jax.errors import InputError
from asymvq_jax.files.formats import HEAD, picture_format
from asymvq_jax.files.masks import Mask
from asymvq_jax.files.outputs import check_not_input, check_writable, write_bytes
from asymvq_jax.files.pictures import FORMATS, Picture, check_fits, read_file, read_picture, read_size, write_picture
from asymvq_jax.inference.ahead import compile_ahead
from asymvq_jax.inference.blend import MIXING, Blend
from asymvq_jax.inference.crop import Crop
from asymvq_jax.inference.edits import Change, Edit, MaskReading, list_edits, read_edit
from asymvq_jax.inference.inpainting import (
    Inpainted,
    Keep,
    Keeping,
    inpaint_picture,
    margin_of,
    thin_parts,
    ways_of_keeping,
)
from asymvq_jax.inference.latents import Layout
from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
from asymvq_jax.inference.whole import check_condition, decode, encode
from asymvq_jax.models.autoencoder import Autoencoder

log = logging.getLogger(__name__)

Large = Literal["strips", "devices"]


@dataclass(frozen=True)
class Task:
    """One picture to inpaint.

    Attributes:
        image: the original picture's file.
        checkpoint: of the autoencoder, of any kind that is read.
        out: the file to write.
        mask: a picture of the same size; None: found by comparing `edited`.
        latent: an edited latent's file; None: the picture's own, or that of `edited`.
        edited: the file of the picture as an editor has returned it.
        edits: a folder of masks with latents or edited pictures, which are applied in order instead of these three.
        save_mask: where the mask is written.
        latent_layout: the latent's; None: found.
        latent_scaled: whether it is times the scaling factor; None: found.
        masks: how masks are read.
        keep, blend, band, crop: see `inpainting.inpaint`.
        large: how a picture is decoded that one device's memory cannot hold; such pictures are also read.
        scaling_factor, shift_factor: how a diffusion model scales the latents; None: the checkpoint's file says it.
        dtype: the compute type; None: the checkpoint's.
    """

    image: str
    checkpoint: str
    out: str
    mask: str | None = None
    latent: str | None = None
    edited: str | None = None
    edits: str | None = None
    save_mask: str | None = None
    latent_layout: Layout | None = None
    latent_scaled: bool | None = None
    masks: MaskReading = field(default_factory=MaskReading)
    keep: Keep | None = None
    blend: Blend | None = None
    band: int | None = None
    crop: Crop | None = None
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
    edits = _check_options(task)
    original = _read_picture(task)
    changes = [read_edit(edit, original.size, task.masks, large=task.large is not None) for edit in edits]
    programs: dict[str, Callable[..., Any]] = {}

    def known(config: ModelConfig) -> None:
        if task.large is None and task.crop is None:
            encodes = any(change.latent is None for change in changes)
            margin = margin_of(config, _keeping(task))
            programs.update(compile_ahead(config, original.size, encodes=encodes, margin=margin))

    # Once, and only if there is something to generate.
    model = functools.cache(lambda: _read_model(task, known))
    begin = time.perf_counter()
    picture, said, changed = original, "", False
    for change in changes:
        mask, edited = change.settle(picture)
        if task.save_mask is not None:
            write_picture(task.save_mask, Picture((mask.values * 255).round().astype("uint8")))
        said = mask.describe()
        if mask.empty:
            continue
        done = _apply(task, model(), picture, mask, change, edited, programs)
        picture, changed = done.picture, True
        said += "" if done.tone_step is None else f"; tone step at the edge: {done.tone_step:.2f} levels of 255"
    height, width = picture.size
    what = said if task.edits is None else f"{len(changes)} edits"
    if not changed:
        _give_back(task, original)
        return f"{task.out}: {width} x {height} px, {what}: the picture as it was"
    for lost in write_picture(task.out, picture):
        log.warning("warning: %s", lost)
    return f"{task.out}: {width} x {height} px, {what}, {time.perf_counter() - begin:.1f} s with compilation"


def _read_model(task: Task, known: Callable[[ModelConfig], None]) -> Autoencoder:
    model = read_model(
        task.checkpoint, given_factors(task.scaling_factor, task.shift_factor), dtype=task.dtype, known=known
    )
    if _keeping(task).keep == "model":
        check_condition(model.config, f"--checkpoint {task.checkpoint}")
    return model


def _apply(
    task: Task,
    model: Autoencoder,
    picture: Picture,
    mask: Mask,
    change: Change,
    edited: Any,
    programs: dict[str, Callable[..., Any]],
) -> Inpainted:
    """The picture after one edit, by `programs` where some were compiled ahead."""
    latent = change.latent
    layout = task.latent_layout or (None if latent is None else latent.layout)
    region = None if task.crop is None else task.crop.region(mask.values, model.config.downsampling)
    size = picture.size if region is None else region.work
    if warning := thin_parts(mask.values if region is None else region.enter_mask(mask.values), model.config):
        log.warning("warning: %s: %s", change.edit.mask or change.edit.edited, warning)
    done = inpaint_picture(
        model,
        picture,
        mask.values,
        None if latent is None else latent.values,
        keep=_keeping(task).keep,
        blend=task.blend,
        band=task.band,
        crop=task.crop,
        edited=edited,
        layout=layout,
        scaled=task.latent_scaled if latent is None or task.latent_scaled is not None else latent.scaled,
        **(programs or _for_size(task.large, -(-size[0] // model.config.downsampling))),
    )
    if done.region is not None:
        log.info("%s", done.region.describe())
    if done.reading is not None:
        log.info("%s", done.reading.describe())
        if done.reading.warning:
            log.warning("warning: %s", done.reading.warning)
    return done


def _check_options(task: Task) -> list[Edit]:
    """What is known without reading a pixel; returns the edits."""
    edits = _list_edits(task)
    outputs = {"--out": (task.out, tuple(FORMATS)), "--save-mask": (task.save_mask, (".png",))}
    for option, (path, endings) in outputs.items():
        if path is not None:
            for edit in edits:
                check_not_input(option, path, {"--image": task.image, **edit.inputs()})
            check_writable(path, endings)
    if task.save_mask is not None:
        check_not_input("--save-mask", task.save_mask, {"--out": task.out})
    keep, blend, _ = _keeping(task)
    if task.edits is not None and blend in MIXING:
        raise InputError(f"--blend {blend} changes kept pixels, which --edits keeps: expected none, tone or poisson")
    if keep == "exact" and FORMATS[PurePath(task.out).suffix.lower()] == "JPEG":
        why = _exact(task) or ("--keep exact" if task.keep else "--blend")
        raise InputError(f"--out {task.out}: JPEG changes every pixel; {why} needs .png or .webp")
    if not any(edit.latent for edit in edits) and (task.latent_layout is not None or task.latent_scaled is not None):
        raise InputError("--latent-layout and --latent-scaled describe --latent, which is missing; name it too")
    size = read_size(task.image, large=task.large is not None)
    check_fits(task.out, size)
    return edits


def _list_edits(task: Task) -> list[Edit]:
    single = Edit(task.mask, task.latent, task.edited)
    if task.edits is not None:
        for name, given in {**single.inputs(), "--save-mask": task.save_mask}.items():
            if given is not None:
                raise InputError(f"{name} {given} does not go with --edits, whose folder has the masks; leave it out")
        return list_edits(task.edits)
    if task.mask is None and task.edited is None:
        raise InputError("nothing says what is to be generated: expected --mask, --edited or --edits")
    if task.latent is not None and (task.edited is not None or task.mask is None):
        raise InputError(f"--latent {task.latent} does not go with --edited {task.edited}: give one of them")
    return [single]


def _exact(task: Task) -> str:
    """The option that asks for kept pixels that are exact, but for --keep."""
    return "--edits" if task.edits is not None else "--crop-and-stitch" if task.crop is not None else ""


def _keeping(task: Task) -> Keeping:
    return ways_of_keeping(task.keep, task.blend, task.band, exact=_exact(task))


def _read_picture(task: Task) -> Picture:
    picture = read_picture(task.image, large=task.large is not None)
    for note in picture.notes:
        log.warning("warning: %s: %s", task.image, note)
    return picture


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
