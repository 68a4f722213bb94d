"""Folders of pictures with their masks and, where there are any, edited latents: what an evaluation is made of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from asymvq_jax import inference
from asymvq_jax.errors import DataError, EvaluationError, InputError
from asymvq_jax.files import images, tensors
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.folders import Listing, by_stem, list_folder
from asymvq_jax.files.masks import load_mask
from asymvq_jax.models.autoencoder import Autoencoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One picture, (h, w, 3) uint8, its mask, (h, w, 1) float32, and its edited latent (None: the picture's own).

    `latent_scaled` says whether that is times the scaling factor; None: found by `inference.latents.understand`.
    """

    name: str
    image: Array
    mask: Array
    latent: Array | None = None
    latent_scaled: bool | None = None


def list_pairs(folder: str) -> list[tuple[epath.Path, epath.Path]]:
    """The files `name.png` and `name_mask.png` (any picture format) of a folder; `name_example.png` is passed over.

    Raises:
        EvaluationError: the folder is missing or empty, or a picture or mask lacks its other half, or two files have
            one name, or some pictures have an edited latent (`name.npy` or another kind of file) and others none.
    """
    listing = _listed(folder, "--pairs")
    try:
        files = by_stem(listing.pictures)
        latents = by_stem(_latents(listing))
    except DataError as error:
        raise EvaluationError(f"--pairs {folder}: {error}") from None
    names = [stem for stem in files if not stem.endswith(("_mask", "_example"))]
    missing = [f"{n}_mask (for {files[n].name})" for n in names if f"{n}_mask" not in files]
    missing += [
        f"{stem.removesuffix('_mask')} (for {path.name})"
        for stem, path in files.items()
        if stem.endswith("_mask") and stem.removesuffix("_mask") not in files
    ]
    if missing:
        raise EvaluationError(f"--pairs {folder}: missing {', '.join(missing)}")
    if not names:
        raise EvaluationError(f"--pairs {folder} holds no pictures; expected name.png beside name_mask.png")
    without = [n for n in names if n not in latents]
    if 0 < len(without) < len(names):
        raise EvaluationError(
            f"--pairs {folder}: {without[0]}.npy is missing; expected a latent of every picture or none"
        )
    if names[0] in latents:
        log.info("%d edited latents beside the pictures, such as %s", len(names), latents[names[0]].name)
    texts = [path for path in listing.others if path.suffix.lower() == ".txt"]
    if rest := listing.describe_rest(used=[*latents.values(), *texts]):
        log.info("%s", rest)
    return [(files[n], files[f"{n}_mask"]) for n in names]


def list_latents(folder: str) -> list[epath.Path]:
    """The latents' files of a folder.

    Raises:
        EvaluationError: the folder is missing or holds none.
    """
    listing = _listed(folder, "--latents")
    paths = _latents(listing)
    if not paths:
        raise EvaluationError(f"--latents {folder}: expected a directory of {', '.join(tensors.SUFFIXES)} files")
    if rest := listing.describe_rest(used=paths):
        log.info("%s", rest)
    return paths


def _listed(folder: str, option: str) -> Listing:
    try:
        return list_folder(folder, option)
    except DataError as error:
        raise EvaluationError(str(error)) from None


def _latents(listing: Listing) -> list[epath.Path]:
    return [path for path in listing.others if path.suffix.lower() in tensors.SUFFIXES]


def read_pairs(paths: Sequence[tuple[epath.Path, epath.Path]], *, scaled: bool | None = None) -> Iterator[Pair]:
    """Reads what `list_pairs` found, one pair at a time; `scaled` says how the latents are, see `Pair`.

    Raises:
        EvaluationError: a mask is of another size than its picture, or a latent's file cannot be read.
    """
    for path, mask_path in paths:
        image, read = images.read(path), load_mask(mask_path)
        if image.shape[:2] != read.size:
            sizes = [f"{p.name} is {x[1]} x {x[0]} px" for p, x in ((path, image.shape), (mask_path, read.size))]
            raise EvaluationError(f"{' and '.join(sizes)}; they must be of one size")
        if warning := read.doubt and read.warning(mask_path.name):
            log.warning("%s", warning)
        latent, is_scaled = None, scaled
        files = (path.parent / f"{path.stem}{suffix}" for suffix in tensors.SUFFIXES)
        if (found := next((file for file in files if file.is_file()), None)) is not None:
            stored = read_latent(found)
            latent, is_scaled = stored.values, stored.scaled if scaled is None else scaled
        yield Pair(path.name, image, read.values.astype(np.float32), latent, is_scaled)


def read_latent(path: epath.Path) -> tensors.LatentFile:
    """Reads a latent's file; raises EvaluationError, which names it, where it does not hold one."""
    try:
        return tensors.read_latent_file(path)
    except InputError as error:
        raise EvaluationError(str(error)) from None


def pair_latent(model: Autoencoder, pair: Pair) -> jax.Array | Array:
    """The latent of a pair as the decoders take it: the edited one, or else the picture's own.

    Raises:
        EvaluationError: the edited one is not the picture's.
    """
    pixels = images.to_float(pair.image)[None]
    if pair.latent is None:
        return inference.encode(model, pixels)
    try:
        reading = inference.understand(
            pair.latent, model.config, pair.image.shape[:2], own=lambda: inference.encode(model, pixels),
            mask=pair.mask, scaled=pair.latent_scaled, norm=model.normalization(),
        )  # fmt: skip
    except InputError as error:
        raise EvaluationError(f"the latent beside {pair.name}: {error}") from None
    if not reading.scaled and pair.latent_scaled is None:
        log.warning("the latent beside %s is taken as unscaled (%s)", pair.name, reading.reason)
    return reading.latent
