"""Folders of pictures with their masks and, where there are any, edited latents: what an evaluation is made of."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from asymvq_jax.data.sources import SUFFIXES
from asymvq_jax.errors import EvaluationError
from asymvq_jax.files import images


@dataclass(frozen=True)
class Pair:
    """One picture, (h, w, 3) uint8, its mask, (h, w, 1) float32, and its edited latent (None: the picture's own)."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    latent: np.ndarray | None = None


def list_pairs(folder: str) -> list[tuple[epath.Path, epath.Path]]:
    """The files `name.png` and `name_mask.png` (any picture format) of a folder; `name_example.png` is passed over.

    Raises:
        EvaluationError: the folder is missing or empty, or a picture or mask lacks its other half, or some pictures
            have an edited latent (`name.npy`) and others none.
    """
    root = epath.Path(folder)
    if not root.is_dir():
        raise EvaluationError(f"--pairs {folder} is not a directory")
    files = {p.stem: p for p in sorted(root.iterdir()) if p.suffix.lower() in SUFFIXES}
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
    without = [n for n in names if not (root / f"{n}.npy").is_file()]
    if 0 < len(without) < len(names):
        raise EvaluationError(
            f"--pairs {folder}: {without[0]}.npy is missing; expected a latent of every picture or none"
        )
    return [(files[n], files[f"{n}_mask"]) for n in names]


def read_pairs(paths: Sequence[tuple[epath.Path, epath.Path]]) -> Iterator[Pair]:
    """Reads what `list_pairs` found, one pair at a time.

    Raises:
        EvaluationError: a mask is of another size than its picture.
    """
    for path, mask_path in paths:
        image, mask = images.read(path), images.read_mask(mask_path)
        if image.shape[:2] != mask.shape[:2]:
            sizes = [f"{p.name} is {x.shape[1]} x {x.shape[0]} px" for p, x in ((path, image), (mask_path, mask))]
            raise EvaluationError(f"{' and '.join(sizes)}; they must be of one size")
        latent = path.parent / f"{path.stem}.npy"
        yield Pair(path.name, image, mask, read_array(latent) if latent.is_file() else None)


def read_array(path: epath.Path) -> np.ndarray:
    """Reads a .npy file.

    Raises:
        EvaluationError: it is no such file.
    """
    try:
        return np.load(io.BytesIO(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} is no readable .npy file: {error}") from None
