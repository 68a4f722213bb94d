"""Whole pictures to measure on: a folder, a folder laid out as MISATO is, or a configuration's held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from etils import epath

from asymvq_jax.config import DataConfig
from asymvq_jax.data.sources import open_source
from asymvq_jax.errors import EvaluationError
from asymvq_jax.files import images
from asymvq_jax.files.folders import by_stem, list_folder
from asymvq_jax.files.masks import generated, load_mask


@dataclass(frozen=True)
class Picture:
    """One picture, (h, w, 3) uint8, and the mask that came with it, (h, w, 1) float32, if there was one."""

    name: str
    image: np.ndarray
    mask: np.ndarray | None = None


def read_pictures(folder: str, count: int, size: int) -> list[Picture]:
    """The first pictures of a folder and of those inside it, in the order of their names.

    A folder that holds the folders image and mask, with files of the same names in both, is laid out as MISATO is
    (ASUKA, arXiv 2312.04831), and gives the masks as well; white is what is to be generated.

    Args:
        folder: local, or one that etils.epath knows.
        count: how many pictures to read at most.
        size: side of the centre square that they are scaled to, px; 0 leaves them as they are.

    Raises:
        EvaluationError: no picture, a picture without a mask, or a mask of another size.
        DataError: the folder is missing or cannot be read.
    """
    root = epath.Path(folder)
    if all((root / name).is_dir() for name in ("image", "mask")):
        found, masks = (list_folder(root / name, "--pictures").pictures for name in ("image", "mask"))
        return _with_masks(found, masks, count, size)
    paths = list_folder(folder, "--pictures", recursive=True).pictures
    if not paths:
        raise EvaluationError(f"--pictures {folder} holds no pictures; expected PNG, JPEG or WebP files")
    return [Picture(path.name, fit(images.read(path), size)) for path in paths[:count]]


def _with_masks(paths: Sequence[epath.Path], mask_paths: Sequence[epath.Path], count: int, size: int) -> list[Picture]:
    masks = by_stem(mask_paths)
    pictures = []
    for path in paths[:count]:
        if path.stem not in masks:
            raise EvaluationError(
                f"--pictures: {path} has no mask; expected {path.stem}.png in {path.parent.parent}/mask"
            )
        image, mask = images.read(path), load_mask(masks[path.stem]).values
        if image.shape[:2] != mask.shape[:2]:
            raise EvaluationError(
                f"--pictures: {path.name} is {image.shape[1]} x {image.shape[0]} px and its mask {mask.shape[1]} x "
                f"{mask.shape[0]} px; they must have the same size"
            )
        mask = generated(fit(mask.astype(np.float32), size)).astype(np.float32)
        pictures.append(Picture(path.name, fit(image, size), mask.reshape(*mask.shape[:2], 1)))
    if not pictures:
        raise EvaluationError("--pictures: the folder image holds no pictures; expected PNG, JPEG or WebP files")
    return pictures


def held_out_pictures(config: DataConfig, count: int, size: int) -> list[Picture]:
    """The first pictures of the configuration's held-out half; arguments and errors as in `read_pictures`."""
    source = open_source(config, train=False)
    return [
        Picture(source.name(i).rsplit("/", 1)[-1], fit(source.read(i), size)) for i in range(min(count, len(source)))
    ]


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square at `size` px a side, or for 0 the image as it is."""
    if not size:
        return image
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    # Enlarging by area would repeat pixels.
    how = cv2.INTER_AREA if side >= size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square, (size, size), interpolation=how))
