"""Evaluates a model: python eval.py --config configs/demo.py --checkpoint runs/demo/asymmetric [--pairs DIR]."""

import argparse
import json
import logging
import math
import sys

from asymvq_jax import images
from asymvq_jax.checkpoints import load_model
from asymvq_jax.compilation import keep_compiled_programs
from asymvq_jax.config import UserError, flatten, load_config
from asymvq_jax.data.pipeline import held_out
from asymvq_jax.evaluation import Pair, evaluate, list_pairs, read_pairs, table
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.outputs import check_writable, write_bytes


def main() -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Any field of the config can be set: --group.field=v")
    parser.add_argument("--config", required=True, help="a Python file in configs/")
    parser.add_argument("--checkpoint", required=True, help="a run, one of its steps, or what asymvq_jax.convert wrote")
    parser.add_argument("--plain", help="checkpoint of the plain autoencoder; default: the config's run.init_from")
    parser.add_argument("--pairs", help="a folder of name.png and name_mask.png; default: the config's held-out source")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--picture", help="write a picture grid to this file")
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
    if options.picture:
        check_writable(options.picture, images.FORMATS)
    if options.json:
        check_writable(options.json, (".json",))
    if options.pairs:
        paths = list_pairs(options.pairs)
        pairs, count = read_pairs(paths), len(paths)
    else:
        count = config.run.eval_pictures
        examples = held_out(config.data, count, config.run.seed)
        both = zip(examples["image"], examples["mask"], strict=True)
        pairs = (Pair(str(i), image, mask.astype("float32")) for i, (image, mask) in enumerate(both))
    model = load_model(options.checkpoint, dtype=config.model.dtype)
    plain = options.plain or config.run.init_from
    plain_model = load_model(plain, dtype=config.model.dtype) if plain else None
    results = evaluate(model, plain_model, pairs, count, load_lpips("vgg16", config.loss.perceptual_weights))
    print(f"\n{results.pictures} pictures from {options.pairs or f'the held-out half of {config.data.source!r}'}")
    print(table(results))
    if options.json:
        # JSON has no infinity (a perfect PSNR) and no NaN (an empty region): both become null.
        rows = {r: {n: v if math.isfinite(v) else None for n, v in m.items()} for r, m in results.rows.items()}
        numbers = {"pictures": results.pictures, "rows": rows, "counts": results.counts}
        write_bytes(options.json, json.dumps(numbers | {"config": flatten(config)}, indent=2).encode() + b"\n")
    if options.picture:
        images.write(options.picture, results.grid())


if __name__ == "__main__":
    sys.exit(main())
