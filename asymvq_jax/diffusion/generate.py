"""Pictures from a pipeline, one or many: checks, batches, and files."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from asymvq_jax import inference
from asymvq_jax.config import MeshConfig, ModelConfig
from asymvq_jax.convert.convert import read_model
from asymvq_jax.data.sources import SUFFIXES
from asymvq_jax.devices import cluster, sharding
from asymvq_jax.diffusion import sampling
from asymvq_jax.diffusion.pipeline import (
    Description,
    Pipeline,
    describe,
    describe_checkpoint,
    is_checkpoint,
    load,
    place,
)
from asymvq_jax.diffusion.schedulers import make_solver
from asymvq_jax.diffusion.settings import Generate
from asymvq_jax.errors import GenerateError
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable, try_out, write_bytes, writing
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import split

log = logging.getLogger(__name__)

# What a picture is made of.
NEEDED = {"text": ("prompt",), "inpaint": ("prompt", "image", "mask"), "edit": ("image", "mask", "example")}
# The files of --folder, where .png stands for any picture.
PARTS = {"prompt": "name.txt", "image": "name.png", "mask": "name_mask.png", "example": "name_example.png"}
# JAX's keys tell no more seeds apart.
SEEDS = 2**32


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
    # Height and width, px; None: the size that the model was trained on.
    size: tuple[int, int] | None = None


class Inputs(NamedTuple):
    """What a job's files hold."""

    job: Job
    # (h, w, 3), (h, w, 1) and (h, w, 3) uint8, the first two at the job's size.
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    example: np.ndarray | None = None


def run(options: Generate) -> None:
    """Makes and writes the pictures that the options ask for, those that exist already left out."""
    _check_options(options)
    jobs = _list_jobs(options)
    described = _describe(options)
    # For its errors.
    make_solver(described.scheduler, options.steps)
    jobs = _sized(jobs, described, options)
    index, count = cluster.share()
    if count > 1:
        log.info("process %d of %d makes %d of %d pictures", index, count, len(jobs[index::count]), len(jobs))
    # Before a look at what is there, which changes while the others work.
    jobs = jobs[index::count]
    made = {job for job in jobs if _is_made(job, options)}
    waiting = [job for job in jobs if job not in made]
    if made:
        _check_latents(made, options)
        log.info("%d of %d pictures are in %s already", len(made), len(jobs), options.out)
    if not waiting:
        return
    decoder = _read_decoder(described.autoencoder, options)
    _make(load(described, options.dtype), decoder, waiting, options)


def _check_options(options: Generate) -> None:
    """Raises GenerateError for options that are out of range, or that would do nothing."""
    for name in ("steps", "count", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise GenerateError(f"--{name} {value}: expected 1 or more")
    if not 0 <= options.guidance <= 100:
        raise GenerateError(f"--guidance {options.guidance}: expected 0 to 100")
    if options.folder is not None and options.count > 1:
        raise GenerateError(f"--count {options.count}: goes without --folder, each of whose names is one picture")


def _describe(options: Generate) -> Description:
    path, task = options.pipeline, options.task
    # Options that edit does not have.
    told = {name: getattr(options, name, None) for name in ("tokenizer", "prediction_type")}
    if is_checkpoint(path):
        return describe_checkpoint(path, task, scheduler=options.scheduler, **told)
    for name, value in told.items():
        if value is not None:
            option = name.replace("_", "-")
            raise GenerateError(f"--{option}: is for original checkpoints; {path} says itself what it has")
    return describe(path, task, options.scheduler)


def _read_decoder(own: ModelConfig, options: Generate) -> Autoencoder | None:
    """The model that --checkpoint names.

    Raises:
        UserError: one is wanted and none is named, or it is of other latents than the pipeline's own, or has no
            condition branch where there is a picture to preserve.
    """
    if options.decode == "plain" or options.checkpoint is None:
        if options.decode in ("asymmetric", "both") and not own.condition:
            raise GenerateError(f"--decode {options.decode}: name the asymmetric decoder's checkpoint by --checkpoint")
        return None
    decoder = read_model(options.checkpoint, dtype=options.dtype)
    if options.task != "text":
        inference.check_condition(decoder.config, f"--checkpoint {options.checkpoint}")
    fields = ("latent_channels", "downsampling", "scaling_factor", "shift_factor")
    theirs = [f"{n}={getattr(decoder.config, n)} (the pipeline's: {getattr(own, n)})" for n in fields
              if getattr(decoder.config, n) != getattr(own, n)]  # fmt: skip
    if theirs:
        raise GenerateError(f"--checkpoint {options.checkpoint} is of other latents: {', '.join(theirs)}")
    return decoder


def _decoders(pipeline: Pipeline, decoder: Autoencoder | None, options: Generate) -> dict[str, Autoencoder]:
    """The autoencoders to decode with, by the title of their pictures."""
    own = pipeline.autoencoder
    if decoder is not None:
        ours, known = split(decoder)[1], split(own)[1]
        name = "encoder.conv_in.kernel"
        if ours[name].shape != known[name].shape or not np.allclose(ours[name], known[name], atol=1e-2):
            log.warning("--checkpoint %s was trained with another encoder than the pipeline's", options.checkpoint)
    elif own.config.condition:
        decoder = own
    way = options.decode or ("plain" if decoder is None else "asymmetric")
    both = {"plain": own, "asymmetric": decoder}
    return both if way == "both" else {way: both[way]}


def _list_jobs(options: Generate) -> list[Job]:
    """What is to be made, every file checked to be there and of the right size.

    Raises:
        UserError: options or files that are missing or do not fit.
    """
    task = options.task
    needed = NEEDED[task]
    given = [name for name in ("prompt", "image", "mask", "example") if getattr(options, name, None) is not None]
    size = images.parse_size("--size", options.size) if options.size else None
    if options.save_latents:
        latents = epath.Path(options.save_latents)
        if task != "text" and size and options.folder and latents.resolve() == epath.Path(options.folder).resolve():
            raise GenerateError(f"--save-latents {latents}: with --size they are not of the size of the pictures there")
        with writing(latents):
            try_out(latents)
    if options.folder is not None:
        if given:
            raise GenerateError(f"--folder {options.folder}: takes the place of {', '.join('--' + n for n in given)}")
        jobs = _folder_jobs(options, needed)
    else:
        if missing := [name for name in needed if name not in given]:
            raise GenerateError(f"{task} needs {', '.join('--' + n for n in missing)}, or --folder")
        sources = {name: getattr(options, name) for name in needed}
        if options.count == 1:
            check_writable(options.out, images.FORMATS)
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
    if path.suffix.lower() in images.FORMATS or path.is_file():
        raise GenerateError(f"--out {out}: expected a directory for more than one picture")
    with writing(path):
        try_out(path)
    return path


def _folder_jobs(options: Generate, needed: Sequence[str]) -> list[Job]:
    root, out = epath.Path(options.folder), _directory(options.out)
    if not root.is_dir():
        raise GenerateError(f"--folder {options.folder} is not a directory")
    if out.resolve() == root.resolve():
        raise GenerateError(f"--out {options.out}: name another directory than --folder")
    files = sorted(root.iterdir())
    texts = _by_stem(files, (".txt",)) if "prompt" in needed else {}
    pictures = _by_stem(files, SUFFIXES) if "image" in needed else {}
    leading = "image" if "image" in needed else "prompt"
    names = [n for n in pictures if not n.endswith(("_mask", "_example"))] if leading == "image" else list(texts)
    if not names:
        raise GenerateError(f"--folder {options.folder} holds no {PARTS[leading]}")
    jobs, missing = [], []
    for i, name in enumerate(names):
        found = {
            "prompt": _read_prompt(texts[name]) if name in texts else None,
            "image": pictures.get(name),
            "mask": pictures.get(f"{name}_mask"),
            "example": pictures.get(f"{name}_example"),
        }
        missing += [PARTS[part].replace("name", name) for part in needed if found[part] is None]
        jobs.append(Job(name, out / f"{name}.png", options.seed + i, **{part: str(found[part]) for part in needed}))
    if missing:
        raise GenerateError(f"--folder {options.folder}: missing {', '.join(missing)}")
    return jobs


def _by_stem(files: Sequence[epath.Path], suffixes: Collection[str]) -> dict[str, epath.Path]:
    """The files that end in one of `suffixes`, by their names without it.

    Raises:
        GenerateError: two have the same.
    """
    found: dict[str, epath.Path] = {}
    for path in files:
        if path.suffix.lower() in suffixes and found.setdefault(path.stem, path) is not path:
            raise GenerateError(f"{found[path.stem]} and {path.name} are of one name; remove or rename one of them")
    return found


def _read_prompt(path: epath.Path) -> str:
    try:
        prompt = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerateError(f"{path} is no readable text (UTF-8): {error}") from None
    if not prompt:
        log.warning("%s is empty: that picture is of anything", path)
    return prompt


def _with_size(job: Job, size: tuple[int, int] | None, options: Generate) -> Job:
    """The job with its size, after a look at its pictures' heads."""
    if options.task != "text":
        found, mask = images.read_size(job.image), images.read_size(job.mask)
        if found != mask:
            (h, w), (mh, mw) = found, mask
            raise GenerateError(f"{job.image} is {w} x {h} px and {job.mask} {mw} x {mh} px; they must be of one size")
        size = size or found
    if job.example:
        images.read_size(job.example)
    return replace(job, size=size)


def _sized(jobs: Sequence[Job], described: Description, options: Generate) -> list[Job]:
    """The jobs, those without a size in the one that the UNet was trained on; by size, for batches."""
    side = described.unet.sample_size * described.autoencoder.downsampling
    jobs = [replace(job, size=job.size or (side, side)) for job in jobs]
    if options.task == "text":
        for job in jobs:
            sampling.check_size(described.unet, described.autoencoder, job.size)
    return sorted(jobs, key=lambda job: job.size)


def _is_made(job: Job, options: Generate) -> bool:
    """Whether a picture of many is there already."""
    return (options.folder is not None or options.count > 1) and job.out.exists()


def _check_latents(made: Collection[Job], options: Generate) -> None:
    """Raises GenerateError where latents of pictures that are there are wanted and missing."""
    if not options.save_latents:
        return
    if without := sorted(job.out.name for job in made if not _latent_file(job, options).exists()):
        raise GenerateError(
            f"{options.out} has {without[0]} and {len(without) - 1} more without a latent in {options.save_latents}: "
            "name another --out, or remove them to make them again"
        )


def _latent_file(job: Job, options: Generate) -> epath.Path:
    return epath.Path(options.save_latents) / f"{job.name}.npy"


def _make(pipeline: Pipeline, decoder: Autoencoder | None, jobs: Sequence[Job], options: Generate) -> None:
    """Makes the jobs' pictures, batch by batch, each written when it is done.

    Raises:
        UserError: an input is not readable, or a latent not finite; the other pictures are made all the same.
    """
    devices = jax.local_devices()
    # Also where there are fewer jobs, so that a resumed run's pictures have the same bits.
    batch = options.batch or len(devices)
    # The largest number of devices that a batch splits evenly over.
    used = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    mesh = sharding.make_mesh(MeshConfig(), devices[:used]) if used > 1 else None
    if mesh is not None:
        # Once, and not for every batch.
        pipeline = place(pipeline, mesh)
        decoder = decoder and inference.place(decoder, mesh)
    decoders = _decoders(pipeline, decoder, options)
    log.info(
        "%d pictures, %d steps, %d at once on %d devices; the first of each size is compiled",
        len(jobs),
        options.steps,
        batch,
        used,
    )
    begin, failed = time.perf_counter(), []
    with tqdm(total=len(jobs), unit="picture", desc=options.task) as progress:
        for part in _batches(jobs, batch):
            inputs = []
            for job in part:
                try:
                    inputs.append(_read_inputs(job))
                except images.ImageError as error:
                    failed.append(str(error))
            try:
                failed += _make_batch(pipeline, decoders, inputs, batch, options, mesh) if inputs else []
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                height, width = inputs[0].job.size
                reason = f"{batch} at once of {width} x {height} px need more memory than the devices have"
                failed += [f"{each.job.name}: {reason}; try a smaller --batch or --size" for each in inputs]
            progress.update(len(part))
    made = len(jobs) - len(failed)
    log.info("%s: %d pictures in %.1f s with compilation", options.out, made, time.perf_counter() - begin)
    if failed:
        raise GenerateError(f"{len(failed)} of {len(jobs)} pictures could not be made:\n  " + "\n  ".join(failed))


def _make_batch(
    pipeline: Pipeline,
    decoders: dict[str, Autoencoder],
    inputs: Sequence[Inputs],
    batch: int,
    options: Generate,
    mesh: jax.sharding.Mesh | None,
) -> list[str]:
    """Makes and writes the pictures of at most `batch` inputs of one size; returns a line for each that failed."""
    filled = [*inputs, *[inputs[-1]] * (batch - len(inputs))]
    image = mask = None
    if options.task != "text":
        image, mask = np.stack([each.image for each in filled]), np.stack([each.mask for each in filled])
    latent = np.asarray(_latents(pipeline, filled, image, mask, options, mesh))
    finite = np.isfinite(latent).all((1, 2, 3))
    latent = np.where(finite[:, None, None, None], latent, 0)
    decoded = {}
    for title, model in decoders.items():
        # A pipeline's own asymmetric autoencoder decodes plainly without the picture.
        seen = (None, None) if title == "plain" else (image, mask)
        decoded[title] = sampling.decode(model, latent, *seen, size=inputs[0].job.size, mesh=mesh)
    failed = []
    for i, (job, *_) in enumerate(inputs):
        if finite[i]:
            _write(job, latent[i], {title: pictures[i] for title, pictures in decoded.items()}, options)
        else:
            failed.append(f"{job.name}: the latent is not finite; try --dtype float32, or less --guidance")
    return failed


def _batches(jobs: Sequence[Job], batch: int) -> Iterator[Sequence[Job]]:
    """Parts of at most `batch` neighbours of one size."""
    start = 0
    for i in range(1, len(jobs) + 1):
        if i == len(jobs) or i - start == batch or jobs[i].size != jobs[start].size:
            yield jobs[start:i]
            start = i


def _read_inputs(job: Job) -> Inputs:
    """Raises ImageError where a file is no readable picture."""
    if not job.image:
        return Inputs(job)
    image, mask = images.read(job.image), images.read_mask(job.mask)
    if image.shape[:2] != mask.shape[:2]:
        raise images.ImageError(f"{job.image} and {job.mask} are of different sizes, turned as they are to be shown")
    if not mask.any():
        log.warning("%s is black: nothing of %s is generated", job.mask, job.image)
    if image.shape[:2] != job.size:
        shrinks = job.size[0] * job.size[1] < image.shape[0] * image.shape[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = cv2.resize(image, job.size[::-1], interpolation=way)
        mask = cv2.resize(mask, job.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)[..., None]
    return Inputs(job, image, mask, images.read(job.example) if job.example else None)


def _latents(
    pipeline: Pipeline,
    inputs: Sequence[Inputs],
    image: np.ndarray | None,
    mask: np.ndarray | None,
    options: Generate,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """Of a batch, by the task."""
    jobs = [each.job for each in inputs]
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    shared = {"guidance": options.guidance, "steps": options.steps, "mesh": mesh}
    if options.task == "edit":
        return sampling.edit(pipeline, [each.example for each in inputs], image, mask, seeds, **shared)
    shared["negative"] = options.negative
    if options.task == "inpaint":
        return sampling.inpaint(pipeline, prompts, image, mask, seeds, **shared)
    return sampling.text_to_image(pipeline, prompts, seeds, jobs[0].size, **shared)


def _write(job: Job, latent: np.ndarray, decoded: dict[str, np.ndarray], options: Generate) -> None:
    """The latent first: a picture that is there has its latent too."""
    if options.save_latents:
        buffer = io.BytesIO()
        np.save(buffer, latent)
        write_bytes(_latent_file(job, options), buffer.getvalue())
    pictures = list(decoded.items())
    images.write(job.out, pictures[0][1] if len(pictures) == 1 else images.grid([(t, [p]) for t, p in pictures]))
