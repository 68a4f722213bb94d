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
    # Pictures in each random subset that KID is the mean of.
    kid_subset: int = 1000
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
    list_pictures(options.images, "--images")
    params = load_inception(options.inception)
    reference, pool = distribution.read_reference(options.reference, params, options.batch)
    if options.save_statistics and pool is not None:
        distribution.save_statistics(options.save_statistics, pool)
    generated = distribution.folder_features(options.images, "--images", params, options.batch)
    numbers: dict[str, float] = {"pictures": len(generated.pool)}
    numbers["fid"] = distribution.frechet_distance(distribution.statistics(generated.pool), reference)
    if pool is not None:
        numbers["kid"], numbers["kid_std"] = distribution.kernel_distance(generated.pool, pool, options.kid_subset)
    numbers["inception_score"], numbers["inception_score_std"] = distribution.inception_score(generated.logits)
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


main = command("asymvq score", Score, work, positional=("images", "reference"))
