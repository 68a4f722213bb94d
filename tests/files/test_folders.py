"""One rule for what a folder holds: what is a picture, what is left out and why."""

import io
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from asymvq_jax.errors import DataError
from asymvq_jax.files.folders import BROKEN_LINK, HIDDEN, REPEATED, by_stem, list_folder
from asymvq_jax.files.formats import HEAD, picture_format
from tests.calls import count_calls


def _bytes(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), 90, np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WebP"), ("GIF", "GIF"), ("TIFF", "TIFF"), ("BMP", "BMP"),
     ("AVIF", "AVIF"), ("PPM", "PNM")],
)  # fmt: skip
def test_first_bytes_tell_the_format(kind, name):
    assert picture_format(_bytes(kind)[:HEAD]) == name


@pytest.mark.parametrize(
    "head", [b"", b"BM is a text", b"<!DOCTYPE html>", b"PK\3\4", b"P6", b"\0\0\0\x18ftypmp42\0\0\0\0isom"]
)
def test_other_files_are_no_pictures(head):
    assert picture_format(head) is None


def test_heic_is_known_by_its_first_and_by_its_compatible_brands():
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        assert picture_format(b"\0\0\0\x18ftyp" + brands) == "HEIC"


def _names(paths, root):
    return [str(path.relative_to(root)) for path in paths]


def test_listing(tmp_path):
    picture = _bytes("PNG")
    for name in (
        "b.jfif",
        "a.PNG",
        "c.avif",
        "no-ending",
        "deep/d.heic",
        "._a.PNG",
        ".cache/e.png",
        "deep/.hidden.jpg",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "README").write_text("no ending, and not a picture")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    (tmp_path / "deep/up").symlink_to(tmp_path)
    (tmp_path.parent / "elsewhere").mkdir()
    (tmp_path.parent / "elsewhere/f.tif").write_bytes(picture)
    (tmp_path / "other").symlink_to(tmp_path.parent / "elsewhere")

    flat = list_folder(tmp_path)
    assert _names(flat.pictures, tmp_path) == ["a.PNG", "b.jfif", "c.avif", "no-ending"]
    assert _names(flat.others, tmp_path) == ["README", "notes.txt"]

    deep = list_folder(tmp_path, recursive=True)
    assert _names(deep.pictures, tmp_path) == ["a.PNG", "b.jfif", "c.avif", "deep/d.heic", "no-ending", "other/f.tif"]
    assert {each.reason: each.count for each in deep.left_out} == {HIDDEN: 3, BROKEN_LINK: 2, REPEATED: 2}
    said = deep.describe_rest(used=[tmp_path / "notes.txt"])
    assert "3 hidden" in said
    assert "README" in said
    assert "notes.txt" not in said


def test_nothing_left_out_says_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    assert list_folder(tmp_path).describe_rest() == ""


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--folder .*missing does not exist"):
        list_folder(tmp_path / "missing", "--folder")
    with pytest.raises(DataError, match=r"data.path='.*file' is a file; expected a directory"):
        list_folder(tmp_path / "file", "data.path=")


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    """Root, whom permissions do not stop, may run this."""
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    listing = list_folder(tmp_path, recursive=True)
    assert len(listing.pictures) == 1
    assert listing.describe_rest().endswith("1 folders that cannot be read (Permission denied), such as closed")
    with pytest.raises(DataError, match=r"data.path='.*closed' cannot be read: Permission denied"):
        list_folder(tmp_path / "closed", "data.path=")


def test_equal_stems_are_refused(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png have the same name"):
        by_stem(list_folder(tmp_path).pictures)
    (tmp_path / "a.jpg").unlink()
    assert sorted(by_stem(list_folder(tmp_path).pictures)) == ["a", "b"]


def test_work_grows_linearly(tmp_path):
    calls = []
    for count in (100, 800):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.png").touch()
        calls.append(count_calls(partial(list_folder, folder, recursive=True)))
    assert calls[1] < 9 * calls[0]
