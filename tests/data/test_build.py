"""Data sets built from pictures: what is kept, resuming to the same bytes, checks, messages."""

import fcntl
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections import Counter, namedtuple
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from asymvq_jax.commands.build_data import main
from asymvq_jax.config import DataConfig
from asymvq_jax.data import build as module
from asymvq_jax.data import shards
from asymvq_jax.data.build import build, check
from asymvq_jax.data.listing import LOST_LINK, Link, Picture, Pictures
from asymvq_jax.data.sources import open_source
from asymvq_jax.errors import DataError, OutputError, UserError
from asymvq_jax.files import images
from asymvq_jax.files.folders import Tally

SUFFIXES = (".png", ".jpg", ".webp", ".bmp")
# A picture of noise, or a few.
SHARD_MIB = 0.01


def _folder(path: Path, count: int = 12) -> str:
    """Noise, in all formats and in subdirectories; picture i is 40 + i px wide and 50 px high."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = path / ("sub/" * (i % 3)) / f"picture{i:02d}{SUFFIXES[i % len(SUFFIXES)]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 40 + i, 3), np.uint8)).save(file)
    (path / "notes.txt").write_text("no picture")
    (path / ".hidden.png").write_text("no picture")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return _folder(tmp_path / "pictures")


def _tar(folder: str, target: Path, mode: str = "w") -> str:
    with tarfile.open(target, mode) as tar:
        tar.add(folder, arcname=".")
    return str(target)


def _read(target, name="mine") -> list[np.ndarray]:
    """All pictures of both splits, as training and evaluation read them."""
    config = DataConfig(source="tfds", path=name, data_dir=str(target))
    sources = [open_source(config, train=train) for train in (True, False)]
    return [source.read(i) for source in sources for i in range(len(source))]


def _contents(pictures) -> Counter:
    return Counter((picture.shape, picture.tobytes()) for picture in pictures)


def _records(target, split, name="mine") -> dict[str, bytes]:
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = tfds.builder(name, data_dir=str(target)).as_data_source(split=split, decoders=decoders)
    return {record["file_name"].decode(): record["image"] for record in source}


def _bytes(directory) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in Path(directory).rglob("*") if file.is_file()
    }


def test_a_folder_becomes_a_data_set_that_training_reads(tmp_path, folder, capsys):
    result = build(folder, str(tmp_path), "mine", held_out=0.25, shard_mib=SHARD_MIB, workers=2)
    assert result == tmp_path / "mine" / "1.0.0"
    files = [file for file in Path(folder).rglob("picture*")]
    assert _contents(_read(tmp_path)) == _contents(map(images.read, files))
    train, validation = (_records(tmp_path, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9, 3)
    for name, data in (train | validation).items():
        original = (Path(folder) / name).read_bytes()
        assert data == original if name.endswith((".png", ".jpg")) else data.startswith(b"\x89PNG")
    assert len(list(result.glob("mine-train.array_record-*-of-*"))) > 2
    assert not [file for file in (tmp_path / "mine").rglob("*") if file.name.startswith(".")]
    assert list(train) != sorted(train)
    said = "12 pictures; left out: 1 hidden (the name begins with a dot), such as .hidden.png; 1 not pictures, such as "
    assert f"{said}notes.txt" in capsys.readouterr().out
    assert "tensorflow" not in sys.modules


def _nested(folder: str, path: Path) -> None:
    path.mkdir()
    for i, part in enumerate(("[!s]*", "sub")):
        with tarfile.open(path / f"class{i}.tar", "w") as tar:
            for file in sorted(Path(folder).glob(part)):
                tar.add(file, arcname=file.name)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tars in a tar", "tars in a folder"])
def test_archives_hold_the_same_pictures(tmp_path, folder, kind):
    if kind.startswith("tars"):
        _nested(folder, tmp_path / "classes")
        source = str(tmp_path / "classes")
        source = _tar(source, tmp_path / "all.tar") if kind == "tars in a tar" else source
    else:
        source = _tar(folder, tmp_path / f"all.{kind}", f"w:{kind.partition('.')[2]}")
    build(source, str(tmp_path), "mine", shard_mib=SHARD_MIB)
    assert _contents(_read(tmp_path)) == _contents(map(images.read, Path(folder).rglob("picture*")))
    prefix = "class" if kind.startswith("tars") else ("picture", "sub")
    assert all(name.startswith(prefix) for name in _records(tmp_path, "train"))
    assert os.listdir(tmp_path / "mine") == ["1.0.0"]
    if not kind.startswith("tars"):
        build(folder, str(tmp_path / "of_folder"), "mine", shard_mib=SHARD_MIB)
        assert _bytes(tmp_path / "of_folder/mine") == _bytes(tmp_path / "mine")


def test_small_and_corrupt_pictures_are_left_out_counted_and_named(tmp_path, folder, capsys):
    bad = Path(folder) / "picture00.png"
    bad.write_bytes(bad.read_bytes()[:100])
    build(folder, str(tmp_path), "mine", min_side=44, shard_mib=SHARD_MIB)
    assert sorted(picture.shape[1] for picture in _read(tmp_path)) == list(range(44, 52))
    printed = capsys.readouterr()
    assert "left out: picture00.png is not a readable picture" in printed.err
    assert "(3 too small and 1 corrupt ones left out)" in printed.out
    manifests = "".join(file.read_text() for file in (tmp_path / "mine/1.0.0/manifests").glob("mine-*"))
    assert manifests.count("picture00.png") == 1
    check(str(tmp_path), "mine")


def test_held_out_pictures_of_their_own(tmp_path, folder):
    other = _folder(tmp_path / "other", count=2)
    build(folder, str(tmp_path), "mine", held_out=other)
    assert len(_records(tmp_path, "train")) == 12
    assert sorted(_records(tmp_path, "validation")) == ["picture00.png", "sub/picture01.jpg"]


# Kills the process while the given picture is decoded.
KILLED = """
import os, signal, sys
from asymvq_jax.commands.build_data import main
from asymvq_jax.files import images
decode, count = images.decode, int(sys.argv.pop(1))
def dying(*arguments):
    global count
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*arguments)
images.decode = dying
main(sys.argv[1:])
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path, folder, capsys, monkeypatch):
    arguments = [folder, str(tmp_path / "killed"), "--name=mine", f"--shard-mib={SHARD_MIB}", "--workers=1"]
    process = subprocess.run([sys.executable, "-c", KILLED, "8", *arguments], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    work = tmp_path / "killed/mine/.1.0.0.incomplete"
    complete = len(list((work / "manifests").glob("mine-*")))
    assert list(work.glob(".*.partial"))
    assert complete > 0
    with pytest.raises(DataError, match="is not a TFDS data set"):
        _read(tmp_path / "killed")

    # A second death, between a shard and its manifest.
    def die(*_):
        raise RuntimeError("dead")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_json", die)
        with pytest.raises(RuntimeError, match="dead"):
            main(arguments)
    whole = build(folder, str(tmp_path / "whole"), "mine", shard_mib=SHARD_MIB, workers=3)
    count = len(list(whole.glob("mine-*")))
    assert complete < count
    for already in (complete, count):
        capsys.readouterr()
        assert main(arguments) == 0
        assert f"{already} of {count} shards are complete" in capsys.readouterr().out
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


def _spoil(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard, _: shard.write_bytes(_spoil(shard.read_bytes())), "{} does not match its checksum"),
        (lambda shard, _: shard.unlink(), "{} is missing"),
        (lambda _, manifest: manifest.unlink(), "{}.json is missing"),
    ],
)
def test_damage_is_found_and_mended(tmp_path, folder, spoil, message):
    result = build(folder, str(tmp_path), "mine", shard_mib=SHARD_MIB)
    whole = _bytes(result)
    check(str(tmp_path), "mine", workers=2)
    shard = max(result.glob("mine-train.array_record-*"))
    spoil(shard, result / "manifests" / f"{shard.name}.json")
    with pytest.raises(DataError, match=message.format(shard.name)):
        check(str(tmp_path), "mine")
    build(folder, str(tmp_path), "mine", shard_mib=SHARD_MIB)
    assert _bytes(result) == whole


def test_records_that_training_cannot_use_are_found(tmp_path, folder):
    result = build(folder, str(tmp_path), "mine")
    plan = result / "manifests/plan.json"
    plan.write_text(plan.read_text().replace('"minimum side": 0', '"minimum side": 42'))
    with pytest.raises(DataError, match=r"mine/\w+\[\d+\]: its shorter side is below 42 px"):
        check(str(tmp_path), "mine")


def test_another_source_or_other_options_are_refused(tmp_path, folder):
    result = build(folder, str(tmp_path), "mine")
    before = _bytes(result)
    with pytest.raises(DataError, match=r"was begun with another source or other options .*minimum side 0, now 8"):
        build(folder, str(tmp_path), "mine", min_side=8)
    (Path(folder) / "picture00.png").rename(Path(folder) / "renamed.png")
    with pytest.raises(DataError, match="names and sizes"):
        build(folder, str(tmp_path), "mine")
    shutil.rmtree(result / "manifests")
    with pytest.raises(DataError, match="holds a data set that another command made"):
        build(folder, str(tmp_path), "mine")
    assert {name: data for name, data in before.items() if "manifests" not in name} == _bytes(result)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "none does not exist; expected a directory"),
        (lambda p: p / "empty", "empty holds no pictures (found 1 other files)"),
        (lambda p: p / "one", "one holds too few pictures (1) to hold any out; name those with --eval"),
        (lambda p: p / "empty/notes.txt", "notes.txt is not a readable tar"),
        (lambda p: p / "cut.tar", "cut.tar is not a readable tar"),
        (lambda p: p / "damaged.tar", "damaged.tar is not a readable tar: damaged at byte"),
        (lambda p: p / "cut.tar.gz", "cut.tar.gz is damaged"),
        (lambda p: p / "photos.zip", "photos.zip is an archive of a kind that is not read (zip"),
        (lambda p: p / "photos.tar.xz", "photos.tar.xz is an archive of a kind that is not read (zip"),
        (lambda p: p / "corrupt", "nothing is left for the train split: 0 pictures, 0 GB (0 too small and 2 corrupt"),
    ],
)
def test_unusable_sources_are_named(tmp_path, folder, make, message, capsys):
    for name in ("empty", "one", "corrupt"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty/notes.txt").write_text("no picture")
    shutil.copy(f"{folder}/picture00.png", tmp_path / "one")
    for i in range(3):
        (tmp_path / f"corrupt/{i}.jpg").write_text("no picture")
    whole = Path(_tar(folder, tmp_path / "whole.tar")).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        middle, last = tar.getmembers()[5].offset, tar.getmembers()[-1].offset_data
    (tmp_path / "cut.tar").write_bytes(whole[: last + 100])
    (tmp_path / "damaged.tar").write_bytes(whole[:middle] + b"\xff" * 512 + whole[middle + 512 :])
    packed = Path(_tar(folder, tmp_path / "whole.tar.gz", "w:gz")).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    _tar(folder, tmp_path / "photos.tar.xz", "w:xz")
    (tmp_path / "photos.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    assert main([str(make(tmp_path)), str(tmp_path / "target"), "--name=mine"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target/mine/1.0.0").exists()


def test_a_directory_that_cannot_be_read_is_named(tmp_path, folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("sub/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"folders that cannot be read \(Permission denied\), such as sub/sub"):
        build(folder, str(tmp_path), "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My-Photos"}, "--name My-Photos: expected lower-case letters"),
        ({"name": "imagenet2012"}, "--name imagenet2012 is a data set that TFDS itself knows"),
        ({"held_out": 0.0}, "--held-out 0.0: expected a share between 0 and 1"),
        ({"held_out": "none"}, "none does not exist"),
        ({"min_side": -1}, "--min-side -1: expected zero or more"),
        ({"shard_mib": 0.0}, "--shard-mib 0.0: expected a positive number"),
        ({"workers": 0}, "--workers 0: expected at least 1"),
    ],
)
def test_unusable_options_are_named(tmp_path, folder, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build(folder, str(tmp_path / "target"), **({"name": "mine"} | changes))
    assert not (tmp_path / "target").exists()


def test_targets_that_cannot_be_written_are_named(tmp_path, folder, monkeypatch):
    with pytest.raises(OutputError, match="cannot be written"):
        build(folder, f"{folder}/notes.txt", "mine")
    (tmp_path / "mine").mkdir()
    handle = os.open(tmp_path / "mine", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another build is writing"):
        build(folder, str(tmp_path), "mine")
    os.close(handle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10))
    with pytest.raises(OutputError, match=r"has room for 0\.0 GB"):
        build(folder, str(tmp_path), "mine")


def test_a_disk_that_fills_up_ends_the_build_and_can_be_resumed(tmp_path, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OutputError, match=r"mine-.* cannot be written: .*too large"):
            build(folder, str(tmp_path), "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    build(folder, str(tmp_path), "mine")
    check(str(tmp_path), "mine")


def test_ctrl_c_says_how_to_go_on(tmp_path, folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", interrupted)
    assert main([folder, str(tmp_path), "--name=mine"]) == 130
    assert "goes on after the last complete shard" in capsys.readouterr().err


def test_check_wants_a_complete_data_set(tmp_path, capsys):
    assert main([str(tmp_path), "--name=mine", "--check"]) == 2
    assert "holds no complete data set of this command's; build it first" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--name=mine"]) == 2
    assert "expected --images SOURCE and --out TARGET to build, or --out TARGET and --check" in capsys.readouterr().err


def test_pictures_are_ordered_by_a_hash_of_their_names():
    files = [Picture(f"{i}.png", b"x", i, i) for i in range(100)]
    with closing(sqlite3.connect("")) as database:
        pictures, again = (Pictures(database, order, "here", Tally()) for order in (files, reversed(files)))
        whole = list(pictures)
        assert sorted(whole) == sorted(files)
        assert whole == list(again) != files
        assert list(pictures[10:30][5:]) == whole[15:30]
        assert pictures[10:30][-1] == whole[29]
        assert again[3] == whole[3]
        assert pictures[10:].size == sum(picture.size for picture in whole[10:])
        assert pictures[1:].digest() != pictures.digest() == again.digest()


def test_names_that_are_no_text(tmp_path, folder):
    try:
        shutil.copy(f"{folder}/picture00.png", os.fsencode(f"{folder}/") + b"caf\xe9.png")
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    for name, source in (("files", folder), ("archive", _tar(folder, tmp_path / "all.tar"))):
        build(source, str(tmp_path), name, held_out=0.1)
        assert r"caf\xe9.png" in _records(tmp_path, "train", name) | _records(tmp_path, "validation", name)


def test_links_in_an_archive_are_pictures_under_other_names(tmp_path, folder, capsys):
    names = ("picture00.png", "sub/picture01.jpg")
    os.link(f"{folder}/{names[0]}", f"{folder}/sub/hard.png")
    os.symlink("picture01.jpg", f"{folder}/sub/soft.jpg")
    os.symlink("soft.jpg", f"{folder}/sub/softer.jpg")
    os.symlink("nowhere.png", f"{folder}/lost.png")
    for source, target in ((folder, "of_folder"), (_tar(folder, tmp_path / "all.tar"), "of_tar")):
        build(source, str(tmp_path / target), "mine")
        assert "15 pictures; left out: " in capsys.readouterr().out
    assert _bytes(tmp_path / "of_folder/mine") == _bytes(tmp_path / "of_tar/mine")


def test_links_of_an_archive_that_lead_nowhere_are_counted():
    left_out = Tally()
    files = [Picture("a.png", b"x", 0, 1), Link("b.png", "c.png"), Link("c.png", "b.png"), Link("d.png", "gone.png")]
    with closing(sqlite3.connect("")) as database:
        assert [picture.name for picture in Pictures(database, files, "here", left_out)] == ["a.png"]
    assert left_out.counts == {LOST_LINK: 3}


def test_what_an_archive_holds_beside_pictures_is_counted(tmp_path, folder, capsys):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, arcname=".")
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
        tar.add(f"{folder}/picture00.png", arcname="no-ending")
    build(str(tmp_path / "all.tar"), str(tmp_path), "mine")
    printed = capsys.readouterr().out
    assert "13 pictures; left out: " in printed
    for reason in (
        "1 hidden (the name",
        "1 neither files nor folders, such as pipe.png",
        "1 not pictures, such as notes",
    ):
        assert reason in printed


def test_a_file_that_cannot_be_read_is_left_out_counted_and_named(tmp_path, folder, capsys, monkeypatch):
    plain = open

    def failing(file, *rest, **options):
        if not isinstance(file, int) and os.fsdecode(file).endswith("picture00.png"):
            raise OSError(5, "Input/output error")
        return plain(file, *rest, **options)

    monkeypatch.setattr("builtins.open", failing)
    build(folder, str(tmp_path), "mine")
    printed = capsys.readouterr()
    assert "left out: picture00.png cannot be read: Input/output error" in printed.err
    assert "(0 too small and 0 corrupt ones, 1 unreadable ones left out)" in printed.out
    assert len(_read(tmp_path)) == 11


def test_a_damaged_plan_is_named(tmp_path, folder):
    result = build(folder, str(tmp_path), "mine")
    (result / "manifests/plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json is damaged: .*; remove it and build again"):
        build(folder, str(tmp_path), "mine")
