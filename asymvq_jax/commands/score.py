"""asymvq score."""

from __future__ import annotations

import json
from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score a folder of pictures: FID and KID against other pictures, and the Inception Score."""

    # A folder of generated pictures.
    images: str
    # A folder of real pictures, or a .npz of their statistics, written by --save-statistics or by pytorch-fid.
    reference: str
    # Weights of the Inception network: pytorch-fid's or torch-fidelity's .pth file.
    inception: str
    # Pictures a call of all devices.
    batch: int = 64
    # Pictures in each random subset that KID is the mean of; by default 1000, or all where there are fewer.
    kid_subset: int | None = None
    # Write the reference's statistics to this .npz file.
    save_statistics: str | None = None
    # Write the numbers to this .json file.
    json: str | None = None


def work(options: Score) -> None:
    """Computes, prints and writes the scores."""
    from asymvq_jax.data.sources import list_pictures
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.evaluation.metrics import distribution
    from asymvq_jax.evaluation.metrics.inception import load_inception
    from asymvq_jax.files.outputs import check_writable, write_bytes

    keep_compiled_programs()
    for path, suffix in ((options.json, ".json"), (options.save_statistics, ".npz")):
        if path:
            check_writable(path, (suffix,))
    if options.batch < 1:
        raise ConfigError(f"--batch={options.batch}: expected at least 1")
    generated = list_pictures(options.images, "--images")
    if options.reference.endswith(".npz"):
        pictures, known = [], distribution.load_statistics(options.reference)
        real = None if known[1] is None else len(known[1])
    else:
        pictures, known = list_pictures(options.reference, "--reference"), None
        real = len(pictures)
    subset = distribution.check_counts(len(generated), real, options.kid_subset)
    if options.kid_subset is not None and subset is None:
        raise ConfigError("--kid-subset: KID needs features, and these statistics hold none; name a folder of pictures")
    if options.save_statistics and known is not None:
        raise ConfigError(f"--save-statistics: {options.reference} is a file of statistics already")
    params = load_inception(options.inception)
    reference, pool = known or distribution.folder_statistics(options.reference, pictures, params, options.batch)
    if options.save_statistics and pool is not None:
        distribution.save_statistics(options.save_statistics, pool)
    features = distribution.folder_features(options.images, generated, params, options.batch)
    numbers: dict[str, float] = {"pictures": len(features.pool)}
    numbers["fid"] = distribution.frechet_distance(distribution.statistics(features.pool), reference)
    if pool is not None and subset is not None:
        numbers["kid"], numbers["kid_std"] = distribution.kernel_distance(features.pool, pool, subset)
    if len(features.logits) >= distribution.SPLITS:
        numbers["inception_score"], numbers["inception_score_std"] = distribution.inception_score(features.logits)
    _print(numbers, real, subset)
    if options.json:
        write_bytes(options.json, json.dumps(numbers, indent=2).encode() + b"\n")


def _print(numbers: dict[str, float], reference: int | None, subset: int | None) -> None:
    against = "the statistics given" if reference is None else f"{reference} pictures"
    print(f"\n{numbers['pictures']} pictures against {against}")
    print(f"FID              {numbers['fid']:.4g}")
    if "kid" in numbers:
        spread = f"{1e3 * numbers['kid']:.4g} ± {1e3 * numbers['kid_std']:.4g}"
        print(f"KID x 1e3        {spread} (subsets of {subset})")
    else:
        print("KID              needs the reference's pictures, or statistics by --save-statistics")
    if "inception_score" in numbers:
        print(f"Inception Score  {numbers['inception_score']:.4g} ± {numbers['inception_score_std']:.4g}")
    else:
        print("Inception Score  needs ten pictures or more")


main = command("asymvq score", Score, work, positional=("images", "reference"))
