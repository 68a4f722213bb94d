"""Distances between two sets of pictures: FID, KID and the Inception Score.

Pictures pass through in batches that are split over all devices; what stays is 12 KB of features a picture.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from asymvq_jax.config import MeshConfig
from asymvq_jax.data.sources import in_order, list_pictures
from asymvq_jax.devices import sharding
from asymvq_jax.errors import DistributionError
from asymvq_jax.evaluation.metrics.inception import inception, resize
from asymvq_jax.files import images
from asymvq_jax.files.addresses import bucket_errors, read_bytes
from asymvq_jax.files.outputs import write_bytes
from asymvq_jax.models.parameters import Params

# torch-fidelity's defaults, which published scores use.
KID_SUBSETS, KID_SUBSET = 100, 1000
SPLITS = 10
SEED = 2020


class Features(NamedTuple):
    """What Inception says about n pictures: (n, 2048) features and (n, 1008) logits, float32."""

    pool: np.ndarray
    logits: np.ndarray


class Statistics(NamedTuple):
    """Mean (2048,) and covariance (2048, 2048) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Extractor:
    """Takes pictures one by one, and runs Inception on a batch as soon as there is one."""

    def __init__(self, params: Params, batch: int = 64, mesh: Mesh | None = None) -> None:
        """Puts the network onto the devices.

        Args:
            params: from `load_inception`.
            batch: pictures a call of all devices; rounded up to a multiple of their number.
            mesh: the devices; by default all.
        """
        mesh = mesh or sharding.make_mesh(MeshConfig())
        self._batch = -(-batch // mesh.size) * mesh.size
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._split = sharding.batch_sharding(mesh)
        self._run = jax.jit(inception, out_shardings=sharding.replicated(mesh))
        self._waiting: list[np.ndarray] = []
        self._done: list[list[np.ndarray]] = []

    def add(self, picture: np.ndarray) -> None:
        """Takes one picture, (h, w, 3) uint8, of any size."""
        self._add_resized(resize(picture))

    def add_all(self, pictures: Iterable[np.ndarray], threads: int = 8) -> None:
        """Takes many, resizing some ahead in threads."""
        with ThreadPoolExecutor(threads) as pool:
            for _, resized in in_order(pool, resize, pictures, 2 * threads):
                self._add_resized(resized.result())

    def _add_resized(self, picture: np.ndarray) -> None:
        self._waiting.append(picture)
        if len(self._waiting) == self._batch:
            self._flush()

    def _flush(self) -> None:
        count = len(self._waiting)
        batch = np.zeros((self._batch, *self._waiting[0].shape), np.float32)
        batch[:count] = self._waiting
        results = self._run(self._params, jax.device_put(batch, self._split))
        self._done.append([np.asarray(x)[:count] for x in results])
        self._waiting = []

    def features(self) -> Features:
        """Of all pictures so far, in their order."""
        if self._waiting:
            self._flush()
        return Features(*(np.concatenate(parts) for parts in zip(*self._done, strict=True)))


def statistics(pool: np.ndarray) -> Statistics:
    """Mean and (unbiased) covariance of (n, 2048) features.

    Raises:
        DistributionError: fewer than two pictures.
    """
    if len(pool) < 2:
        raise DistributionError(f"FID needs two pictures or more of each set, and one has {len(pool)}")
    pool = pool.astype(np.float64)
    return Statistics(pool.mean(0), np.cov(pool, rowvar=False))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """‖μa - μb‖² + tr(Σa + Σb - 2 (Σa Σb)^½) (FID, arXiv 1706.08500).

    The root's trace is taken from the eigenvalues of the symmetric Σa^½ Σb Σa^½, which are the product's own.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.sqrt(np.maximum(product, 0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace)


def kernel_distance(a: np.ndarray, b: np.ndarray, subset: int = KID_SUBSET) -> tuple[float, float]:
    """KID (arXiv 1801.01401): mean and standard deviation over random subsets of the unbiased squared MMD, with the
    kernel (x·y / d + 1)³.

    Args:
        a, b: (n, d) features.
        subset: pictures in each of `KID_SUBSETS` subsets of either.

    Raises:
        DistributionError: there are fewer pictures than a subset needs.
    """
    if subset < 2 or subset > min(len(a), len(b)):
        raise DistributionError(
            f"KID takes subsets of {subset} pictures, and there are {len(a)} and {len(b)}: expected a subset of 2 to "
            f"{min(len(a), len(b))}; set --kid-subset"
        )
    rng = np.random.RandomState(SEED)
    values = [
        _squared_mmd(*(x[rng.choice(len(x), subset, replace=False)].astype(np.float64) for x in (a, b)))
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        cubes: np.ndarray = (u @ v.T / u.shape[1] + 1) ** 3
        return cubes

    count = len(x)
    within = sum((k.sum() - np.trace(k)) / (count * (count - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """exp(E KL(p(y|x) ‖ p(y))) (arXiv 1606.03498): mean and standard deviation over ten parts of the shuffled pictures.

    Raises:
        DistributionError: fewer than ten pictures.
    """
    if len(logits) < SPLITS:
        raise DistributionError(f"the Inception Score needs {SPLITS} pictures or more, and there are {len(logits)}")
    logits = logits[np.random.RandomState(SEED).permutation(len(logits))].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for i in range(SPLITS):
        part = logs[i * len(logs) // SPLITS : (i + 1) * len(logs) // SPLITS]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def check_counts(generated: int, reference: int | None, subset: int | None) -> int | None:
    """Sees before the work whether there are enough pictures for the scores.

    Args:
        generated: how many generated pictures there are.
        reference: how many real ones; None where only their statistics are known, and KID is not computed.
        subset: pictures in KID's subsets, as asked for; None: `KID_SUBSET`, or as many as there are.

    Returns:
        The size of the subsets; None: KID is not computed.

    Raises:
        DistributionError: there are too few for FID, or for the subset asked for.
    """
    for count in (generated, reference):
        if count is not None and count < 2:
            raise DistributionError(f"FID needs two pictures or more of each set, and one has {count}")
    if reference is None:
        return None
    most = min(generated, reference)
    if subset is not None and not 2 <= subset <= most:
        raise DistributionError(
            f"KID takes subsets of {subset} pictures, and there are {generated} and {reference}: expected a subset of "
            f"2 to {most}; set --kid-subset"
        )
    return min(KID_SUBSET, most) if subset is None else subset


def save_statistics(path: str, pool: np.ndarray) -> None:
    """Writes mean and covariance under pytorch-fid's names (mu, sigma), and the features, which KID needs."""
    buffer = io.BytesIO()
    mean, covariance = statistics(pool)
    np.savez(buffer, mu=mean, sigma=covariance, features=pool)
    write_bytes(path, buffer.getvalue())


def load_statistics(path: str) -> tuple[Statistics, np.ndarray | None]:
    """Reads what `save_statistics` or pytorch-fid wrote; the features are None in the latter's files.

    Raises:
        DistributionError: the file is missing or of another kind.
    """
    try:
        with bucket_errors(path):
            data = read_bytes(path)
        with np.load(io.BytesIO(data)) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DistributionError(f"{path} is not a readable .npz file: {error}") from None
    shapes = {name: arrays[name].shape for name in ("mu", "sigma") if name in arrays}
    if shapes.get("sigma") != shapes.get("mu", ()) * 2 or not shapes.get("mu"):
        raise DistributionError(f"{path}: expected the arrays mu (d,) and sigma (d, d), found {shapes or 'neither'}")
    return Statistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)), arrays.get("features")


def read_reference(path: str, params: Params, batch: int = 64) -> tuple[Statistics, np.ndarray | None]:
    """Statistics and, where known, the features of a folder of real pictures or of a .npz (see `load_statistics`)."""
    if path.endswith(".npz"):
        return load_statistics(path)
    return folder_statistics(path, list_pictures(path, "--reference"), params, batch)


def folder_statistics(
    folder: str, paths: Sequence[epath.Path], params: Params, batch: int = 64
) -> tuple[Statistics, np.ndarray]:
    """Statistics and features of the pictures that were found in a folder."""
    pool = folder_features(folder, paths, params, batch).pool
    return statistics(pool), pool


def folder_features(folder: str, paths: Sequence[epath.Path], params: Params, batch: int = 64) -> Features:
    """Of the pictures that were found in a folder, with a progress bar that names it."""
    extractor = Extractor(params, batch)
    extractor.add_all(images.read(path) for path in tqdm(paths, unit="picture", desc=folder))
    return extractor.features()
