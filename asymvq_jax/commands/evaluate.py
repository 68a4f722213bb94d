"""Evaluates a model: python eval.py --config configs/demo.py --checkpoint runs/demo/asymmetric [--pairs DIR]."""

import argparse
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, flatten, load_config
from asymvq_jax.convert.convert import read_model
from asymvq_jax.data.pipeline import held_out
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.errors import UserError
from asymvq_jax.evaluation.metrics.distribution import read_reference
from asymvq_jax.evaluation.metrics.inception import load_inception
from asymvq_jax.evaluation.pairs import Pair, list_pairs, read_pairs
from asymvq_jax.evaluation.rows import (
    evaluate,
    evaluate_text,
    list_latents,
    paper_table,
    table,
    text_table,
)
from asymvq_jax.evaluation.seam import drift_table, measure_drift, measure_seam, plot, seam_table
from asymvq_jax.files import images
from asymvq_jax.files.outputs import check_writable, write_bytes
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import Params


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Any field of the config can be set: --group.field=v")
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    parser.add_argument("--checkpoint", required=True, help="a run, or whatever asymvq_jax.convert reads")
    parser.add_argument("--plain", help="checkpoint of the plain autoencoder; default: the config's run.init_from")
    parser.add_argument("--pairs", help="a folder of name.png and name_mask.png; default: the config's held-out source")
    parser.add_argument("--inception", help="weights of FID's network (pytorch-fid's, torch-fidelity's): adds FID")
    parser.add_argument("--latents", help="text-to-image instead: a folder of .npy latents to decode without condition")
    parser.add_argument("--reference", help="for --latents: a folder of real pictures, or a .npz of their statistics")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--picture", help="write a picture grid to this file")
    parser.add_argument(
        "--seam",
        help="also measure the tone step at the mask's edge and the drift of repeated edits; "
        "write their plot to this .png file",
    )
    options, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    keep_compiled_programs()
    _run(options, overrides)
    return 0


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(options.config, overrides)
    for path, suffixes in ((options.picture, images.FORMATS), (options.json, (".json",)), (options.seam, (".png",))):
        if path:
            check_writable(path, suffixes)
    numbers = _text_to_image(options, config) if options.latents else _inpainting(options, config)
    if options.json:
        numbers["config"] = flatten(config)
        write_bytes(options.json, json.dumps(_finite(numbers), indent=2).encode() + b"\n")


def _text_to_image(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Decodes latents without condition and prints the scores; returns the numbers."""
    if not (options.inception and options.reference):
        raise UserError("--latents takes --inception WEIGHTS and --reference PICTURES too")
    list_latents(options.latents)
    model, plain, inception = _load(options, config)
    reference, _ = read_reference(options.reference, inception)
    scores = evaluate_text(model, plain, options.latents, reference, inception)
    print(f"\n{text_table(scores)}")
    return {row: {"fid": fid, "inception_score": score} for row, (fid, score) in scores.items()}


def _inpainting(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Measures pairs and prints their tables; returns the numbers."""
    pairs, count = _pairs(options.pairs, config)
    model, plain, inception = _load(options, config)
    lpips = load_lpips("vgg16", config.loss.perceptual_weights)
    results = evaluate(model, plain, pairs(), count, lpips, inception)
    print(f"\n{results.pictures} pictures from {options.pairs or f'the held-out half of {config.data.source!r}'}")
    print(table(results))
    numbers = {"pictures": results.pictures, "rows": results.rows, "counts": results.counts}
    if inception is not None:
        print(f"\n{paper_table(results)}")
    if options.seam:
        numbers["seam"] = measure_seam(model, plain or model, pairs(), count)
        numbers["drift"] = measure_drift(model, plain or model, pairs(), count)
        for latent, rows in numbers["seam"].items():
            print(f"\nthe seam, {latent}\n{seam_table(rows)}")
        print(f"\ndrift over passes of encode and decode\n{drift_table(numbers['drift'])}")
        plot(options.seam, numbers["seam"])
    if options.picture:
        images.write(options.picture, results.grid())
    return numbers


def _load(options: argparse.Namespace, config: Config) -> tuple[Autoencoder, Autoencoder | None, Params | None]:
    """Our model, the plain one and FID's network, the latter two where there are any."""
    inception = load_inception(options.inception) if options.inception else None
    model = read_model(options.checkpoint, dtype=config.model.dtype)
    path = options.plain or config.run.init_from
    try:
        plain = read_model(path, dtype=config.model.dtype) if path else None
    except UserError as error:
        wanted = (
            f"--plain {path}" if options.plain else f"run.init_from={path!r} of the config (or name one by --plain)"
        )
        raise UserError(f"{wanted}, the plain autoencoder: {error}") from None
    return model, plain, inception


def _pairs(folder: str | None, config: Config) -> tuple[Callable[[], Iterator[Pair]], int]:
    """What gives the pairs of a folder, or else the config's held-out ones, as often as it is asked; and how many."""
    if folder:
        paths = list_pairs(folder)
        return partial(read_pairs, paths), len(paths)
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
