"""Pictures from a pipeline, one or many: checks, batches, and files."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from asymvq_jax import inference
from asymvq_jax.config import MeshConfig, ModelConfig
from asymvq_jax.convert.convert import given_factors, read_model
from asymvq_jax.devices import cluster, sharding
from asymvq_jax.diffusion import lora, sampling
from asymvq_jax.diffusion.jobs import MODELS_OWN, Inputs, Job, Original, list_jobs, read_inputs, with_region
from asymvq_jax.diffusion.pipeline import (
    Description,
    Pipeline,
    describe,
    describe_checkpoint,
    is_checkpoint,
    load,
    place,
)
from asymvq_jax.diffusion.settings import Generate, Inpaint, Painting, Prompted, Text
from asymvq_jax.diffusion.solvers import make_solver
from asymvq_jax.errors import GenerateError, ImageError
from asymvq_jax.files import images
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.outputs import write_bytes
from asymvq_jax.files.pictures import Picture, write_picture
from asymvq_jax.inference.crop import Crop
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import split

log = logging.getLogger(__name__)


def run(options: Generate) -> None:
    """Makes and writes the pictures that the options ask for, those that exist already left out."""
    _check_options(options)
    jobs = list_jobs(options)
    described = _describe(options)
    # For its errors.
    make_solver(described.scheduler, options.steps, options.strength if isinstance(options, Inpaint) else 1.0)
    loras = [lora.read(text) for text in options.lora] if isinstance(options, Prompted) else []
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
    _make(load(described, options.dtype, loras), decoder, waiting, options)


def _check_options(options: Generate) -> None:
    """Raises GenerateError for options that are out of range, or that would do nothing."""
    for name in ("steps", "count", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise GenerateError(f"--{name} {value}: expected 1 or more")
    if not 0 <= options.guidance <= 100:
        raise GenerateError(f"--guidance {options.guidance}: expected 0 to 100")
    if isinstance(options, Prompted) and options.negative and options.guidance <= 1:
        raise GenerateError(
            f"--negative has no effect with --guidance {options.guidance:g}: expected --guidance above 1"
        )
    if isinstance(options, Painting):
        keep = _keeping(options).keep
        if keep == "exact" and epath.Path(options.out).suffix.lower() in (".jpg", ".jpeg"):
            raise GenerateError(
                f"--out {options.out}: JPEG changes every pixel; --keep exact and --crop-and-stitch need .png or .webp"
            )
        if not options.crop_and_stitch and (options.context is not None or options.work_size is not None):
            raise GenerateError("--context and --work-size belong to --crop-and-stitch, which is missing; give it too")
        if keep == "exact" and options.decode == "both":
            raise GenerateError(
                "--decode both does not go with --keep exact or --crop-and-stitch: "
                "choose --decode plain or --decode asymmetric"
            )
    if options.folder is not None and options.count > 1:
        raise GenerateError(f"--count {options.count} does not go with --folder, which makes one picture for each name")


def _keeping(options: Painting) -> inference.Keeping:
    return inference.ways_of_keeping(
        options.keep, options.blend, options.band, exact="--crop-and-stitch" if options.crop_and_stitch else ""
    )


def _describe(options: Generate) -> Description:
    path, task = options.pipeline, options.task
    # Options that edit does not have.
    stated = {name: getattr(options, name, None) for name in ("tokenizer", "prediction_type")}
    scale = given_factors(options.scaling_factor, options.shift_factor)
    if is_checkpoint(path):
        return describe_checkpoint(path, task, scheduler=options.scheduler, factors=scale, **stated)
    for name, value in stated.items():
        if value is not None:
            option = name.replace("_", "-")
            raise GenerateError(
                f"--{option} is for original checkpoints only; {path} is a pipeline folder, which has its own"
            )
    return describe(path, task, options.scheduler, scale)


def _read_decoder(own: ModelConfig, options: Generate) -> Autoencoder | None:
    """The model that --checkpoint names.

    Raises:
        UserError: one is needed and not named, or it does not fit the pipeline's latents, or it has no condition
            branch where there is a picture to preserve.
    """
    if options.decode == "plain" or options.checkpoint is None:
        if options.decode in ("asymmetric", "both") and not own.condition:
            raise GenerateError(
                f"--decode {options.decode} needs an asymmetric decoder: name its checkpoint by --checkpoint"
            )
        return None
    factors = given_factors(options.scaling_factor, options.shift_factor)
    decoder = read_model(options.checkpoint, factors, dtype=options.dtype)
    if isinstance(options, Painting) and _keeping(options)[0] == "model":
        inference.check_condition(decoder.config, f"--checkpoint {options.checkpoint}")
    fields = ("latent_channels", "downsampling", "scaling_factor", "shift_factor", "latent_mean", "latent_std",
              "latent_patch", "batch_norm_epsilon")  # fmt: skip
    theirs = [f"{n}={getattr(decoder.config, n)} (the pipeline's: {getattr(own, n)})" for n in fields
              if getattr(decoder.config, n) != getattr(own, n)]  # fmt: skip
    if theirs:
        raise GenerateError(
            f"--checkpoint {options.checkpoint} does not fit the pipeline's latents: {', '.join(theirs)}"
        )
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
    if decoder is None:
        return {"plain": own}
    way = options.decode or "asymmetric"
    both = {"plain": own, "asymmetric": decoder}
    return both if way == "both" else {way: both[way]}


def _sized(jobs: Sequence[Job], described: Description, options: Generate) -> list[Job]:
    """The jobs sorted by size, for batches; those without one get the size that the UNet was trained on."""
    side = described.unet.sample_size * described.autoencoder.downsampling
    jobs = [replace(job, size=(side, side)) if job.size == MODELS_OWN else job for job in jobs]
    if isinstance(options, Painting) and options.crop_and_stitch:
        crop = Crop(options.context or Crop.context, options.work_size or side)
        factor = described.autoencoder.downsampling
        jobs = [with_region(job, crop, factor, options) for job in jobs]
    if options.task == "text":
        for job in jobs:
            sampling.check_size(described.unet, described.autoencoder, job.size)
    return sorted(jobs, key=lambda job: job.size)


def _is_made(job: Job, options: Generate) -> bool:
    """Whether a picture of many is there already."""
    return (options.folder is not None or options.count > 1) and job.out.exists()


def _check_latents(made: Collection[Job], options: Generate) -> None:
    """Raises GenerateError where --save-latents is given and a finished picture has no latent there."""
    if not options.save_latents:
        return
    if without := sorted(job.out.name for job in made if not _latent_file(job, options).exists()):
        raise GenerateError(
            f"{options.out} has {without[0]} and {len(without) - 1} more without a latent in {options.save_latents}: "
            "name another --out, or remove these pictures to make them again"
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
                    inputs.append(read_inputs(job, options))
                except ImageError as error:
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
    originals = [each.original for each in filled if each.original is not None]
    latent = np.asarray(_latents(pipeline, [each.job for each in filled], originals, options, mesh))
    finite = np.isfinite(latent).all((1, 2, 3))
    latent = np.where(finite[:, None, None, None], latent, 0)
    # With --count all are fills of one picture, whose condition is then computed once.
    shown = originals[:1] if options.count > 1 else originals
    decoded = {}
    for title, model in decoders.items():
        # A pipeline's own asymmetric autoencoder decodes plainly without the picture.
        blind = title == "plain" or not model.config.condition or not originals
        seen = () if blind else (np.stack([each.picture.to_float() for each in shown]), _masks(shown))
        margin = 0
        if isinstance(options, Painting) and not blind:
            margin = inference.margin_of(model.config, _keeping(options))
        decoded[title] = sampling.decode_float(model, latent, *seen, size=inputs[0].job.size, margin=margin, mesh=mesh)
    failed = []
    for i, each in enumerate(inputs):
        job = each.job
        if finite[i]:
            _write(each, latent[i], {title: pictures[i] for title, pictures in decoded.items()}, options)
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


def _latents(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    originals: Sequence[Original],
    options: Generate,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """The latents of a batch, by the task."""
    prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    guidance, steps = options.guidance, options.steps
    if isinstance(options, Text):
        return sampling.text_to_image(
            pipeline, prompts, seeds, jobs[0].size, negative=options.negative, guidance=guidance, steps=steps, mesh=mesh
        )
    image, mask = np.stack([each.picture.to_uint8() for each in originals]), _masks(originals)
    if isinstance(options, Inpaint):
        return sampling.inpaint(
            pipeline,
            prompts,
            image,
            mask,
            seeds,
            negative=options.negative,
            guidance=guidance,
            steps=steps,
            strength=options.strength,
            mesh=mesh,
        )
    examples = [each.example for each in originals]
    return sampling.edit(pipeline, examples, image, mask, seeds, guidance=guidance, steps=steps, mesh=mesh)


def _masks(originals: Sequence[Original]) -> Array:
    """(b, h, w, 1) float32."""
    return np.stack([each.mask.values for each in originals]).astype(np.float32)


def _write(inputs: Inputs, latent: Array, decoded: dict[str, Array], options: Generate) -> None:
    """The latent first: a picture that is there has its latent too."""
    job = inputs.job
    if options.save_latents:
        buffer = io.BytesIO()
        np.save(buffer, latent)
        write_bytes(_latent_file(job, options), buffer.getvalue())
    finished = {title: _finished(inputs, pixels, options) for title, pixels in decoded.items()}
    if len(finished) > 1:
        images.write(job.out, images.grid([(title, [picture.to_uint8()]) for title, picture in finished.items()]))
        return
    for lost in write_picture(job.out, next(iter(finished.values()))):
        log.warning("warning: %s: %s", job.out, lost)


def _finished(inputs: Inputs, decoded: Array, options: Generate) -> Picture:
    """A picture of what was decoded, (h, w, 3) float32, with all that its original has."""
    if inputs.original is None or not isinstance(options, Painting):
        return Picture(images.to_uint8(decoded))
    picture, mask = inputs.original.whole or inputs.original[:2]
    if mask.empty:
        return picture
    return inference.compose(picture, decoded, mask.values, _keeping(options), inputs.job.region)[0]
