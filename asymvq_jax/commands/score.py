"""Scores a folder of pictures: python -m asymvq_jax.metrics GENERATED REFERENCE --inception WEIGHTS.

Prints FID and KID against the pictures of the folder REFERENCE, or against the statistics in REFERENCE.npz, and the
Inception Score of GENERATED.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from asymvq_jax.commands.entry import command
from asymvq_jax.data.sources import list_pictures
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.errors import UserError
from asymvq_jax.evaluation.metrics.distribution import (
    KID_SUBSET,
    folder_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    read_reference,
    save_statistics,
    statistics,
)
from asymvq_jax.evaluation.metrics.inception import load_inception
from asymvq_jax.files.outputs import check_writable, write_bytes


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m asymvq_jax.metrics", description=__doc__)
    parser.add_argument("generated", help="a folder of pictures")
    parser.add_argument("reference", help="a folder of pictures, or a .npz of --save-statistics or pytorch-fid")
    parser.add_argument("--inception", required=True, help="pytorch-fid's or torch-fidelity's weights, .pth")
    parser.add_argument("--batch", type=int, default=64, help="pictures a call of all devices")
    parser.add_argument("--kid-subset", type=int, default=KID_SUBSET, help="pictures in a subset; default: %(default)s")
    parser.add_argument("--save-statistics", help="write the reference's statistics to this .npz file")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args(arguments)
    keep_compiled_programs()
    _run(options)
    return 0


def _run(options: argparse.Namespace) -> None:
    for path, suffix in ((options.json, ".json"), (options.save_statistics, ".npz")):
        if path:
            check_writable(path, (suffix,))
    if options.batch < 1:
        raise UserError(f"--batch={options.batch}: expected at least 1")
    list_pictures(options.generated, "GENERATED")
    params = load_inception(options.inception)
    reference, pool = read_reference(options.reference, params, options.batch)
    if options.save_statistics and pool is not None:
        save_statistics(options.save_statistics, pool)
    generated = folder_features(options.generated, "GENERATED", params, options.batch)
    numbers: dict[str, float] = {"pictures": len(generated.pool)}
    numbers["fid"] = frechet_distance(statistics(generated.pool), reference)
    if pool is not None:
        numbers["kid"], numbers["kid_std"] = kernel_distance(generated.pool, pool, options.kid_subset)
    numbers["inception_score"], numbers["inception_score_std"] = inception_score(generated.logits)
    _print(numbers, None if pool is None else len(pool), options.kid_subset)
    if options.json:
        write_bytes(options.json, json.dumps(numbers, indent=2).encode() + b"\n")


def _print(numbers: dict[str, float], reference: int | None, subset: int) -> None:
    against = "the statistics given" if reference is None else f"{reference} pictures"
    print(f"\n{numbers['pictures']} pictures against {against}")
    print(f"FID              {numbers['fid']:.4g}")
    if "kid" in numbers:
        spread = f"{1e3 * numbers['kid']:.4g} ± {1e3 * numbers['kid_std']:.4g}"
        print(f"KID x 1e3        {spread} (subsets of {subset})")
    else:
        print("KID              needs the reference's pictures, or statistics by --save-statistics")
    print(f"Inception Score  {numbers['inception_score']:.4g} ± {numbers['inception_score_std']:.4g}")
