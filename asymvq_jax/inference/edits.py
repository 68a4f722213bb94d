"""What is to be changed in a picture: masks with latents or edited pictures, one or a folder of them in order."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath

from asymvq_jax.errors import DataError, InputError
from asymvq_jax.files.decoding import Array
from asymvq_jax.files.folders import by_stem, list_folder
from asymvq_jax.files.masks import Channel, Mask, load_mask, turned
from asymvq_jax.files.pictures import Picture, read_picture
from asymvq_jax.files.tensors import SUFFIXES, LatentFile, read_latent_file
from asymvq_jax.inference.changes import find_changes

log = logging.getLogger(__name__)
MASK = "_mask"


class Edit(NamedTuple):
    """The files of one change; a mask, an edited picture, or both, and a latent beside a mask."""

    mask: str | None
    latent: str | None = None
    edited: str | None = None

    def inputs(self) -> dict[str, str | None]:
        """By the options that name them."""
        return {"--mask": self.mask, "--latent": self.latent, "--edited": self.edited}


@dataclass(frozen=True)
class MaskReading:
    """How mask files are read; see `files.masks.load_mask`."""

    soft: bool = False
    channel: Channel | None = None
    invert: bool = False


class Change(NamedTuple):
    """What an edit's files hold; no mask where it is to be found."""

    edit: Edit
    mask: Mask | None
    latent: LatentFile | None
    edited: Picture | None

    def settle(self, picture: Picture) -> tuple[Mask, Array | None]:
        """The mask, and the edited picture's pixels, (h, w, 3), where there is one.

        Args:
            picture: what was edited.

        Raises:
            InputError: what was changed cannot be found.
        """
        if self.edited is None or self.mask is not None:
            assert self.mask is not None, "an edit has a mask or an edited picture"
            return self.mask, None if self.edited is None else self.edited.shown()
        try:
            changes = find_changes(picture.shown(), self.edited.shown())
        except InputError as error:
            raise InputError(f"--edited {self.edit.edited}: {error} (--mask)") from None
        log.info("%s: %s", self.edit.edited, changes.describe())
        return Mask(changes.mask, "the edited picture"), changes.edited


def list_edits(folder: str) -> list[Edit]:
    """The edits of a folder in the order of their names: NAME_mask.png with NAME.npy or NAME.png, or NAME.png alone.

    Raises:
        InputError: there is none; a mask has nothing beside it, or a latent no mask.
    """
    try:
        listing = list_folder(folder, "--edits")
        pictures = by_stem(listing.pictures)
        latents = by_stem([path for path in listing.others if path.suffix.lower() in SUFFIXES])
    except DataError as error:
        raise InputError(str(error)) from None
    masks = {name.removesuffix(MASK): path for name, path in pictures.items() if name.endswith(MASK)}
    edited = {name: path for name, path in pictures.items() if not name.endswith(MASK)}
    names = sorted({*masks, *edited, *latents})
    if not names:
        raise InputError(
            f"--edits {folder} holds no NAME{MASK}.png with NAME.npy or NAME.png: add the edits, or name another"
        )
    for name in names:
        if name in edited and name in latents:
            raise InputError(f"--edits {folder}: {edited[name].name} and {latents[name].name}: expected one of them")
        if name not in masks and name in latents:
            raise InputError(f"--edits {folder}: {latents[name].name} has no mask; expected {name}{MASK}.png")
        if name in masks and name not in edited and name not in latents:
            raise InputError(f"--edits {folder}: {masks[name].name} has nothing beside it; expected {name}.npy or .png")
    return [Edit(*(_text(found.get(name)) for found in (masks, latents, edited))) for name in names]


def _text(path: epath.Path | None) -> str | None:
    return None if path is None else str(path)


def read_edit(edit: Edit, size: tuple[int, int], reading: MaskReading, *, large: bool) -> Change:
    """Reads an edit's files.

    Args:
        edit: names them.
        size: the picture's height and width.
        reading: how the mask is read.
        large: whether pictures of any number of pixels are wanted.

    Raises:
        UserError: a file cannot be read, or does not have the picture's size.
    """
    edited = None if edit.edited is None else read_picture(edit.edited, large=large)
    latent = None if edit.latent is None else read_latent_file(edit.latent)
    if edit.mask is None:
        return Change(edit, None, latent, edited)
    mask = load_mask(edit.mask, soft=reading.soft, channel=reading.channel, invert=reading.invert, large=large)
    for what, found in (("mask", mask.size), ("edited picture", size if edited is None else edited.size)):
        if found != size:
            (h, w), (ih, iw) = found, size
            raise InputError(
                f"the {what} is {w} x {h} px and the picture {iw} x {ih} px; they must have the same size"
                + turned(found, size)
            )
    if warning := mask.warning(edit.mask):
        log.warning("%s", warning)
    return Change(edit, mask, latent, edited)
