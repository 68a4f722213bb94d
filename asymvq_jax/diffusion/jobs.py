"""What `asymvq generate` is to make: one picture or a folder of inputs, every file checked before the work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from etils import epath

from asymvq_jax.diffusion.settings import Generate, Painting
from asymvq_jax.errors import DataError, GenerateError, ImageError
from asymvq_jax.files import images, tensors
from asymvq_jax.files.folders import by_stem, list_folder
from asymvq_jax.files.masks import Mask, load_mask, read_mask_size, resized, turned
from asymvq_jax.files.outputs import check_not_input, check_writable, try_out, writing
from asymvq_jax.files.pictures import FORMATS, Picture, check_fits, read_picture, read_size
from asymvq_jax.inference.crop import Crop, Region, scaled

log = logging.getLogger(__name__)

# What a picture is made of.
NEEDED = {"text": ("prompt",), "inpaint": ("prompt", "image", "mask"), "edit": ("image", "mask", "example")}
# The files of --folder, where .png stands for any picture.
PARTS = {"prompt": "name.txt", "image": "name.png", "mask": "name_mask.png", "example": "name_example.png"}
# JAX's keys do not tell more seeds apart.
SEEDS = 2**32
# The size of a job whose options name none: that on which the model was trained.
MODELS_OWN = (0, 0)


@dataclass(frozen=True)
class Job:
    """One picture to make: what it is made of, and where it goes."""

    name: str
    out: epath.Path
    seed: int
    prompt: str = ""
    image: str = ""
    mask: str = ""
    example: str = ""
    # Height and width, px.
    size: tuple[int, int] = MODELS_OWN
    # What of the picture is filled, at `size`; None: all of it.
    region: Region | None = None


class Whole(NamedTuple):
    """The picture and its mask of which a job fills one region."""

    picture: Picture
    mask: Mask


class Original(NamedTuple):
    """The picture that a job changes: picture and mask at the job's size, and the example, (h, w, 3) uint8, of edit."""

    picture: Picture
    mask: Mask
    example: Any
    # Where these are one region only.
    whole: Whole | None = None


class Inputs(NamedTuple):
    """A job, and what its files hold; text has no original."""

    job: Job
    original: Original | None = None


def list_jobs(options: Generate) -> list[Job]:
    """The pictures to make; every file was checked to exist and to have the right size.

    Raises:
        UserError: options or files that are missing or do not fit.
    """
    task = options.task
    needed = NEEDED[task]
    given = [name for name in ("prompt", "image", "mask", "example") if getattr(options, name, None) is not None]
    size = images.parse_size("--size", options.size) if options.size else None
    cropping = isinstance(options, Painting) and options.crop_and_stitch
    if size and cropping:
        raise GenerateError(f"--size {options.size} does not go with --crop-and-stitch, whose size is --work-size")
    if options.save_latents:
        latents = epath.Path(options.save_latents)
        scaling = "--size" if size else "--crop-and-stitch" if cropping else ""
        folder = epath.Path(options.folder).resolve() if options.folder else None
        if task != "text" and scaling and latents.resolve() == folder:
            raise GenerateError(
                f"--save-latents {latents}: with {scaling}, latents do not have the size of the pictures there; "
                "name another directory"
            )
        with writing(latents):
            try_out(latents)
    if options.folder is not None:
        if given:
            raise GenerateError(
                f"--folder {options.folder} replaces {', '.join('--' + n for n in given)}: give only one of them"
            )
        jobs = _folder_jobs(options, needed)
    else:
        if missing := [name for name in needed if name not in given]:
            raise GenerateError(f"{task} needs {', '.join('--' + n for n in missing)}, or --folder")
        sources = {name: getattr(options, name) for name in needed}
        if options.count == 1:
            check_not_input("--out", options.out, {f"--{n}": sources[n] for n in needed if n != "prompt"})
            check_writable(options.out, FORMATS)
            jobs = [Job(epath.Path(options.out).stem, epath.Path(options.out), options.seed, **sources)]
        else:
            directory = _directory(options.out)
            outs = [directory / f"{i:04d}.png" for i in range(options.count)]
            jobs = [Job(out.stem, out, options.seed + i, **sources) for i, out in enumerate(outs)]
    if jobs[0].seed < 0 or jobs[-1].seed >= SEEDS:
        raise GenerateError(f"--seed {options.seed}: expected 0 to {SEEDS - len(jobs)}, for {len(jobs)} pictures")
    return [_with_size(job, size, options) for job in jobs]


def _directory(out: str) -> epath.Path:
    path = epath.Path(out)
    if path.suffix.lower() in FORMATS or path.is_file():
        raise GenerateError(f"--out {out}: expected a directory for more than one picture")
    with writing(path):
        try_out(path)
    return path


def _folder_jobs(options: Generate, needed: Sequence[str]) -> list[Job]:
    assert options.folder is not None
    try:
        listing = list_folder(options.folder, "--folder")
        texts = [path for path in listing.others if path.suffix.lower() == ".txt"]
        latents = [path for path in listing.others if path.suffix.lower() in tensors.SUFFIXES]
        prompts = by_stem(texts) if "prompt" in needed else {}
        pictures = by_stem(listing.pictures) if "image" in needed else {}
    except DataError as error:
        raise GenerateError(str(error)) from None
    out = _directory(options.out)
    if out.resolve() == listing.folder.resolve():
        raise GenerateError(f"--out {options.out}: name another directory than --folder")
    if rest := listing.describe_rest(used=[*texts, *latents]):
        log.info("%s", rest)
    leading = pictures if "image" in needed else prompts
    names = [n for n in leading if "image" not in needed or not n.endswith(("_mask", "_example"))]
    if not names:
        raise GenerateError(f"--folder {options.folder} holds no {PARTS['image' if 'image' in needed else 'prompt']}")
    jobs, missing = [], []
    for i, name in enumerate(names):
        found = {
            "prompt": _read_prompt(prompts[name]) if name in prompts else None,
            "image": pictures.get(name),
            "mask": pictures.get(f"{name}_mask"),
            "example": pictures.get(f"{name}_example"),
        }
        missing += [
            f"{PARTS[part].replace('name', name)} (for {leading[name].name})" for part in needed if found[part] is None
        ]
        parts: dict[str, Any] = {part: str(found[part]) for part in needed}
        jobs.append(Job(name, out / f"{name}.png", options.seed + i, **parts))
    if missing:
        raise GenerateError(f"--folder {options.folder}: missing {', '.join(missing)}")
    return jobs


def _read_prompt(path: epath.Path) -> str:
    try:
        # Windows' editors begin a text with a byte order mark.
        prompt: str = path.read_bytes().decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerateError(f"{path} is not readable text (UTF-8): {error}") from None
    if not prompt:
        log.warning("%s is empty: that picture is generated without a prompt", path)
    return prompt


def with_region(job: Job, crop: Crop, factor: int, options: Painting) -> Job:
    """The job with the region that it fills; as it was where its mask cannot be read, which `read_inputs` will say."""
    try:
        mask = load_mask(job.mask, soft=options.soft_mask, channel=options.mask_channel, invert=options.invert_mask)
    except ImageError:
        return job
    region = crop.region(mask.values, factor)
    return replace(job, size=region.work, region=region)


def _with_size(job: Job, size: tuple[int, int] | None, options: Generate) -> Job:
    """The job with its size, after a look at its pictures' heads."""
    if options.task != "text":
        found, mask = read_size(job.image), read_mask_size(job.mask)
        if found != mask:
            (h, w), (mh, mw) = found, mask
            raise GenerateError(
                f"{job.image} is {w} x {h} px and {job.mask} {mw} x {mh} px; they must have the same size"
                + turned(mask, found)
            )
        size = size or found
    if job.example:
        read_size(job.example)
    if size is not None:
        check_fits(job.out, size)
    return job if size is None else replace(job, size=size)


def read_inputs(job: Job, options: Generate) -> Inputs:
    """What a job's files hold, scaled to its size.

    Raises:
        ImageError: a file is not a readable picture, or a mask could mean two things.
    """
    if not isinstance(options, Painting) or not job.image:
        return Inputs(job)
    picture = read_picture(job.image)
    for note in picture.notes:
        log.warning("warning: %s: %s", job.image, note)
    mask = load_mask(job.mask, soft=options.soft_mask, channel=options.mask_channel, invert=options.invert_mask)
    if picture.size != mask.size:
        raise ImageError(f"{job.image} and {job.mask} have different sizes once turned as their EXIF says")
    if mask.source != "brightness":
        log.info("%s: %s", job.mask, mask.describe())
    if mask.empty:
        log.warning("%s is black: nothing is generated, and %s is returned unchanged", job.mask, job.image)
    elif warning := mask.warning(job.mask):
        log.warning("%s", warning)
    example = images.read(job.example) if job.example else None
    if job.region is not None:
        seen = replace(mask, values=job.region.enter_mask(mask.values))
        return Inputs(job, Original(job.region.enter(picture), seen, example, Whole(picture, mask)))
    return Inputs(job, Original(scaled(picture, job.size), resized(mask, job.size), example))
