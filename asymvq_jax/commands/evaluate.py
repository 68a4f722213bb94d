"""asymvq evaluate."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, Settings, flatten
from asymvq_jax.errors import UserError

if TYPE_CHECKING:
    from asymvq_jax.evaluation.pairs import Pair
    from asymvq_jax.evaluation.pictures import Picture
    from asymvq_jax.evaluation.rows import Results
    from asymvq_jax.evaluation.seam import Models
    from asymvq_jax.models.autoencoder import Autoencoder
    from asymvq_jax.models.parameters import Params


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure what a decoder preserves and how well it fills, beside the plain decoder and pasting."""

    # A published configuration by its name, such as x2, or a Python file that defines get_config().
    config: str
    # The model: a run, or anything that `asymvq convert` reads; by default the small model inside the package.
    checkpoint: str = "tiny"
    # The decoder that came with the encoder, in any of the same forms; by default the configuration's run.init_from.
    plain: str | None = None
    # How a diffusion model scales the models' latents, (latent - shift) * scaling, where a file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # A folder of name.png and name_mask.png (white = generate); by default the configuration's held-out pictures.
    pairs: str | None = None
    # Weights of the Inception network, pytorch-fid's or torch-fidelity's .pth file: adds FID.
    inception: str | None = None
    # Text-to-image instead: a folder of latents to decode without condition. Needs --inception, --reference.
    latents: str | None = None
    # The latents, of --latents or beside the pairs, have not been multiplied by the scaling factor; by default found by
    # comparison with each picture's own latent, and as diffusion models have them where there is no picture.
    unscaled_latents: bool = False
    # For --latents: a folder of real pictures, or a .npz of their statistics.
    reference: str | None = None
    # Write the numbers to this .json file.
    json: str | None = None
    # Write a grid of pictures to this file: .png, .jpg or .webp.
    picture: str | None = None
    # Also run the benchmark of seams on whole pictures: how much the mask's edge shows, what becomes of the fill's
    # colours, and how repeated edits drift. The plot is written to this .png file.
    seam: str | None = None
    # For --seam, and instead of the table of pairs: a folder of whole pictures, or one with the folders image and mask,
    # as MISATO has them; by default the configuration's held-out pictures.
    pictures: str | None = None
    # For --seam: the most pictures.
    seam_pictures: int = 10
    # For --seam: the side of the centre square that they are scaled to, px; 0: as they are.
    seam_size: int = 256
    # For --seam: a second model with a condition branch and the same encoder, trained to harmonise.
    harmonised: str | None = None
    # For --seam: the row that all others are compared with, in paired intervals.
    against: str = "paste"
    settings: Settings


def work(options: Evaluate) -> None:
    """Measures, prints the tables, and writes what was asked for."""
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.files import images
    from asymvq_jax.files.outputs import check_writable

    keep_compiled_programs()
    config = options.settings
    for path, suffixes in ((options.picture, images.FORMATS), (options.json, (".json",)), (options.seam, (".png",))):
        if path:
            check_writable(path, suffixes)
    if (options.pictures or options.harmonised) and not options.seam:
        raise UserError("--pictures and --harmonised belong to the benchmark of seams; add --seam PLOT.png")
    if options.seam_pictures < 1 or options.seam_size < 0:
        raise UserError("--seam-pictures and --seam-size: expected 1 or more pictures and a size of 0 or more")
    results = None
    if options.latents:
        numbers = _text_to_image(options, options.latents, config)
    else:
        numbers, results = _inpainting(options, config)
    # The numbers first: what is finished is not lost to what comes after it.
    if options.json:
        _write_json(options.json, numbers | {"config": flatten(config)})
    if options.picture and results is not None:
        images.write(options.picture, results.grid())


def _write_json(path: str, numbers: dict[str, Any]) -> None:
    from asymvq_jax.files.outputs import write_bytes

    write_bytes(path, json.dumps(_finite(numbers), indent=2).encode() + b"\n")


def _text_to_image(options: Evaluate, latents: str, config: Config) -> dict[str, Any]:
    """Decodes latents without condition and prints the scores; returns the numbers."""
    from asymvq_jax.evaluation.metrics.distribution import read_reference
    from asymvq_jax.evaluation.pairs import list_latents
    from asymvq_jax.evaluation.rows import evaluate_text, text_table

    if options.inception is None or options.reference is None:
        raise UserError("--latents needs --inception WEIGHTS and --reference PICTURES as well")
    list_latents(latents)
    model, plain, inception = _load(options, config)
    assert inception is not None
    reference, _ = read_reference(options.reference, inception)
    scores = evaluate_text(
        model, plain, latents, reference, inception, scaled=False if options.unscaled_latents else None
    )
    print(f"\n{text_table(scores)}")
    return {row: {"fid": fid, "inception_score": score} for row, (fid, score) in scores.items()}


def _inpainting(options: Evaluate, config: Config) -> tuple[dict[str, Any], Results | None]:
    """Measures pairs and seams, and prints their tables; returns the numbers, and what a grid is made of."""
    from asymvq_jax.evaluation.seam import Models, check_row

    pictures = _whole_pictures(options, config) if options.seam else []
    pairs, count = _pairs(options, config) if not options.pictures else (None, 0)
    model, plain, inception = _load(options, config)
    harmonised = (
        _read(options.harmonised, f"--harmonised {options.harmonised}", options, config) if options.harmonised else None
    )
    models = Models(model, plain, harmonised)
    if options.seam:
        models.check()
        check_row(models, options.against)
    numbers: dict[str, Any] = {}
    results = None
    if pairs is not None:
        results = _measure_pairs(options, config, pairs(), count, (model, plain, inception))
        numbers |= {"pictures": results.pictures, "rows": results.rows, "counts": results.counts}
    if options.seam:

        def save(found: dict[str, Any]) -> None:
            numbers.update(found)
            if options.json:
                _write_json(options.json, numbers)

        _measure_seam(options.seam, options.against, pictures, models, config.run.seed, save)
    return numbers, results


def _measure_pairs(
    options: Evaluate,
    config: Config,
    pairs: Iterator[Pair],
    count: int,
    networks: tuple[Autoencoder, Autoencoder | None, Params | None],
) -> Results:
    from asymvq_jax.evaluation.rows import evaluate, paper_table, table
    from asymvq_jax.losses.lpips import load_lpips

    model, plain, inception = networks
    results = evaluate(model, plain, pairs, count, load_lpips("vgg16", config.loss.perceptual_weights), inception)
    print(f"\n{results.pictures} pictures from {options.pairs or f'the held-out half of {config.data.source!r}'}")
    print(table(results))
    if inception is not None:
        print(f"\n{paper_table(results)}")
    return results


def _whole_pictures(options: Evaluate, config: Config) -> list[Picture]:
    from asymvq_jax.evaluation.pictures import held_out_pictures, read_pictures

    if options.pictures:
        return read_pictures(options.pictures, options.seam_pictures, options.seam_size)
    return held_out_pictures(config.data, options.seam_pictures, options.seam_size)


def _measure_seam(
    path: str,
    against: str,
    pictures: list[Picture],
    models: Models,
    seed: int,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Prints the tables and draws the plot; `save` gets every part as soon as it is measured."""
    from asymvq_jax.evaluation import drift, seam, seam_report
    from asymvq_jax.evaluation.protocols import cases, count_cases
    from asymvq_jax.losses.lpips import load_lpips

    def save_seam(measured: list[seam.Measured]) -> None:
        summary = seam_report.summarise(measured, against)
        save({"seam": summary, "seam_cases": [dataclasses.asdict(m) for m in measured]})

    count = count_cases(pictures)
    measured = seam.measure_seam(models, cases(pictures, seed), count, load_lpips("alexnet"), save_seam)
    save_seam(measured)
    summary = seam_report.summarise(measured, against)
    for group, rows in summary.items():
        print(f"\nthe seam, {group}: {len(pictures)} pictures\n{seam_report.seam_table(rows)}")
    print(f"\nover {seam_report.TOGETHER}, 95 % intervals\n{seam_report.goal_table(summary, against)}")
    seam_report.plot(path, summary)
    passes = drift.measure_drift(models, pictures[: drift.PICTURES], seed)
    save({"drift": passes})
    print(f"\ndrift over passes of encode and decode\n{drift.drift_table(passes)}")
    edits = drift.measure_edits(models, pictures, drift.PICTURES, seed)
    save({"edits": edits})
    print(f"\nmany edits\n{drift.edits_table(edits)}")


def _load(options: Evaluate, config: Config) -> tuple[Autoencoder, Autoencoder | None, Params | None]:
    """Our model, the plain one and FID's network, the latter two where there are any."""
    from asymvq_jax.convert.convert import given_factors, read_model
    from asymvq_jax.evaluation.metrics.inception import load_inception

    inception = load_inception(options.inception) if options.inception else None
    factors = given_factors(options.scaling_factor, options.shift_factor)
    model = read_model(options.checkpoint, factors, dtype=config.model.dtype)
    path = options.plain or config.run.init_from
    wanted = f"--plain {path}" if options.plain else f"run.init_from={path!r} of the config (or name one by --plain)"
    plain = _read(path, f"{wanted}, the plain autoencoder", options, config) if path else None
    return model, plain, inception


def _read(path: str, name: str, options: Evaluate, config: Config) -> Autoencoder:
    """Reads a model; messages call it `name`."""
    from asymvq_jax.convert.convert import given_factors, read_model

    factors = given_factors(options.scaling_factor, options.shift_factor)
    try:
        return read_model(path, factors, dtype=config.model.dtype)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _pairs(options: Evaluate, config: Config) -> tuple[Callable[[], Iterator[Pair]], int]:
    """A function that reads the pairs of a folder, or else the configuration's held-out ones, and their number."""
    from asymvq_jax.data.pipeline import held_out
    from asymvq_jax.evaluation.pairs import Pair, list_pairs, read_pairs
    from asymvq_jax.evaluation.rows import GRID_COLUMNS, GRID_ROWS
    from asymvq_jax.files import images
    from asymvq_jax.files.pictures import check_fits

    if options.pairs:
        paths = list_pairs(options.pairs)
        if options.picture:
            size = images.read_size(paths[0][0])
            check_fits(options.picture, images.grid_size(GRID_COLUMNS, min(GRID_ROWS, len(paths)), size))
        return partial(read_pairs, paths, scaled=False if options.unscaled_latents else None), len(paths)
    count = config.run.eval_pictures
    examples = held_out(config.data, count, config.run.seed)
    both = zip(examples["image"], examples["mask"], strict=True)
    pairs = [Pair(str(i), image, mask.astype("float32")) for i, (image, mask) in enumerate(both)]
    return lambda: iter(pairs), count


def _finite(value: object) -> object:
    """The same with None where a number is infinite (a perfect PSNR) or none (an empty region): JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


main = command("asymvq evaluate", Evaluate, work)
