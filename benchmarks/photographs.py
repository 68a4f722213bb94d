"""Gathers photographs to train a small model from: out of Debian packages, Python packages and folders of your own.

asymvq benchmark photographs --out TARGET [--folder PICTURES] writes JPEG copies, 512 px at the shorter side, into
TARGET/train, and every third picture of PICTURES into TARGET/held_out, with the photographs inside scikit-image and
scikit-learn. The Debian packages are fetched by apt-get (200 MB) and unpacked into TARGET/packages; nothing is
installed. Each package's copyright file there names authors and licences.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
from etils import epath

from asymvq_jax.commands.entry import command
from asymvq_jax.data.sources import HELD_OUT_PHOTOS, PHOTO_FOLDERS, TRAIN_PHOTOS, list_pictures
from asymvq_jax.errors import DataError
from asymvq_jax.files import images

SIDE = 512
QUALITY = 97
HELD_OUT_EVERY = 3
# What is a photograph among the pictures of each Debian package (bookworm), below /usr/share.
DEBIAN = {
    "lomiri-wallpapers-16.04": tuple(
        f"backgrounds/{n}.jpg"
        for n in (
            "Picture_1A_by_freespace", "Dragonfly_by_Bolly", "free_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
            "seeding_by_Clements_Engelhardt",
        )
    ),
    "mate-backgrounds": tuple(f"backgrounds/mate/nature/{n}.jpg" for n in ("FreshFlower", "Garden", "LadyBird")),
    "plasma-workspace-wallpapers": tuple(
        f"wallpapers/{n}/contents/images/2560x1600.jpg"
        for n in ("ColorfulCups", "DarkestHour", "EveningGlow", "Grey", "OneStandsOut")
    ),
    "opencv-doc": tuple(
        f"doc/opencv-doc/examples/{n}"
        for n in (
            "data/fruits.jpg", "data/baboon.jpg", "data/home.jpg", "data/leuvenA.jpg", "data/aloeL.jpg",
            "data/board.jpg", "data/messi5.jpg", "data/graf1.png", "data/building.jpg", "data/squirrel_cls.jpg",
            "data/basketball1.png", "data/butterfly.jpg", "data/rubberwhale1.png", "data/orange.jpg",
            "data/apple.jpg", "data/cards.png", "data/smarties.png", "data/starry_night.jpg",
            "data/licenseplate_motion.jpg", "data/ela_original.jpg", "alphamat/input_images/plant.jpg",
            "hfs/data/000.jpg", "reg/home.png", "dnn_superres/butterfly.png", "fuzzy/input.png",
            "text/scenetext01.jpg", "text/scenetext03.jpg",
        )
    ),
}  # fmt: skip
# Inside Python packages, where they are installed.
PYTHON = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "gradio": ("media_assets/images/cheetah1.jpg", "media_assets/images/tower.jpg"),
}


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Gather photographs to train a small model from, as copies of 512 px at the shorter side."""

    # The folder to write train/, held_out/ and packages/ into.
    out: str
    # A folder of photographs of your own, of which every third is held out.
    folder: str | None = None


def work(options: Photographs) -> None:
    """Writes the copies, and prints how many there are."""
    target = Path(options.out)
    train, held_out = target / "train", target / "held_out"
    for folder in (train, held_out):
        folder.mkdir(parents=True, exist_ok=True)
    own = list_pictures(options.folder, "--folder") if options.folder else []
    for i, path in enumerate(own):
        copy(path, held_out if i % HELD_OUT_EVERY == 0 else train)
    for path in (*_debian(target / "packages"), *_python(PYTHON)):
        copy(path, train)
    for names in (TRAIN_PHOTOS, HELD_OUT_PHOTOS):
        for path in _python({p: tuple(f"{PHOTO_FOLDERS[p]}/{n}" for n in files) for p, files in names.items()}):
            copy(path, held_out)
    print(f"{len(list(train.iterdir()))} photographs in {train}, {len(list(held_out.iterdir()))} in {held_out}")


def copy(path: Path | epath.Path, folder: Path) -> None:
    """Writes a smaller copy, named by the picture and the folders that it lies in."""
    image = images.read(str(path))
    scale = min(1.0, SIDE / min(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    name = "_".join((*path.parts[-4:-1], path.stem)) + ".jpg"
    cv2.imwrite(str(folder / name.lower()), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def _debian(folder: Path) -> Iterator[Path]:
    """The photographs inside the Debian packages, fetched where they are not there yet.

    Raises:
        DataError: apt-get or dpkg-deb is missing or fails.
    """
    folder.mkdir(exist_ok=True)
    for package, names in DEBIAN.items():
        unpacked = folder / package
        if not unpacked.exists():
            try:
                subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
                (archive,) = folder.glob(f"{package}_*.deb")
                subprocess.run(["dpkg-deb", "-x", archive.name, package], cwd=folder, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError, ValueError) as error:
                raise DataError(
                    f"the Debian package {package} cannot be fetched: {error}; see apt-get update"
                ) from None
            archive.unlink()
        yield from (unpacked / "usr/share" / name for name in names)


def _python(packages: dict[str, tuple[str, ...]]) -> Iterator[Path]:
    """The photographs inside those Python packages that are installed."""
    for package, names in packages.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            yield from (Path(spec.submodule_search_locations[0]) / name for name in names)


main = command("asymvq benchmark photographs", Photographs, work)
