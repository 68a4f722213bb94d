"""Evaluates a model: python eval.py --config configs/demo.py --checkpoint runs/demo/asymmetric [--pairs DIR]."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

from asymvq_jax import images
from asymvq_jax.checkpoints import load_model
from asymvq_jax.compilation import keep_compiled_programs
from asymvq_jax.config import Config, UserError, flatten, load_config
from asymvq_jax.data.pipeline import held_out
from asymvq_jax.evaluation import Pair, evaluate, list_pairs, read_pairs, table
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.outputs import check_writable, write_bytes
from asymvq_jax.seam import drift_table, measure_drift, measure_seam, plot, seam_table


def main() -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Any field of the config can be set: --group.field=v")
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    parser.add_argument("--checkpoint", required=True, help="a run, one of its steps, or what asymvq_jax.convert wrote")
    parser.add_argument("--plain", help="checkpoint of the plain autoencoder; default: the config's run.init_from")
    parser.add_argument("--pairs", help="a folder of name.png and name_mask.png; default: the config's held-out source")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--picture", help="write a picture grid to this file")
    parser.add_argument(
        "--seam",
        help="also measure the tone step at the mask's edge and the drift of repeated edits; "
        "write their plot to this .png file",
    )
    options, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    keep_compiled_programs()
    try:
        _run(options, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    config = load_config(options.config, overrides)
    for path, suffixes in ((options.picture, images.FORMATS), (options.json, (".json",)), (options.seam, (".png",))):
        if path:
            check_writable(path, suffixes)
    pairs, count = _pairs(options.pairs, config)
    model = load_model(options.checkpoint, dtype=config.model.dtype)
    plain = options.plain or config.run.init_from
    plain_model = load_model(plain, dtype=config.model.dtype) if plain else None
    results = evaluate(model, plain_model, pairs(), count, load_lpips("vgg16", config.loss.perceptual_weights))
    print(f"\n{results.pictures} pictures from {options.pairs or f'the held-out half of {config.data.source!r}'}")
    print(table(results))
    numbers = {"pictures": results.pictures, "rows": results.rows, "counts": results.counts, "config": flatten(config)}
    if options.seam:
        numbers["seam"] = measure_seam(model, plain_model or model, pairs(), count)
        numbers["drift"] = measure_drift(model, plain_model or model, pairs(), count)
        for latent, rows in numbers["seam"].items():
            print(f"\nthe seam, {latent}\n{seam_table(rows)}")
        print(f"\ndrift over passes of encode and decode\n{drift_table(numbers['drift'])}")
        plot(options.seam, numbers["seam"])
    if options.json:
        write_bytes(options.json, json.dumps(_finite(numbers), indent=2).encode() + b"\n")
    if options.picture:
        images.write(options.picture, results.grid())


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


if __name__ == "__main__":
    sys.exit(main())
