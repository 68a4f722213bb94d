"""Makes a TFDS data set of ArrayRecord shards from pictures.

asymvq build-data --images SOURCE --out TARGET --name my_photos [--min-side 256] writes TARGET/my_photos/1.0.0, which
--data.source=tfds --data.path=my_photos --data.data_dir=TARGET reads. SOURCE is a directory tree, a .tar or a .tar.gz;
tars inside either are read too. The pictures' bytes are kept. The same command again goes on after the last complete
shard. asymvq build-data --out TARGET --name my_photos --check reads everything back.
"""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from asymvq_jax.config import DataConfig
from asymvq_jax.data.listing import Pictures, list_source
from asymvq_jax.data.shards import (
    FEATURES,
    MANIFESTS,
    Content,
    Shard,
    find_damage,
    manifest_of,
    read_content,
    read_json,
    write_json,
    write_shard,
)
from asymvq_jax.data.sources import TFDS, in_order
from asymvq_jax.errors import DataError, ImageError, OutputError
from asymvq_jax.files.addresses import bucket_errors, in_bucket
from asymvq_jax.files.locks import only_owner
from asymvq_jax.files.outputs import try_out, writing

VERSION = "1.0.0"


def build(
    source: str,
    target: str,
    name: str,
    *,
    held_out: float | str = 0.02,
    min_side: int = 0,
    shard_mib: float = 256,
    workers: int = 1,
) -> epath.Path:
    """Writes the data set, or what is missing of it; prints what it does.

    Every shard is written under a hidden name, renamed once it is complete, and described by a manifest with the names
    of its pictures and its SHA-256; the directory has its name once all are there. In a bucket, where nothing can be
    renamed, shards are uploaded once they are complete, and TFDS's metadata come last. All bytes follow from the source
    and the options, however often the build was interrupted.

    Args:
        source: a directory, a .tar or a .tar.gz, here or in a bucket; its pictures are ordered by a hash of their
            names.
        target: TFDS's data_dir, here or in a bucket.
        name: of the data set.
        held_out: the share of the pictures that makes the validation split, or another source that does.
        min_side: pictures whose shorter side is below this are left out, px.
        shard_mib: about the size of a shard, MiB.
        workers: threads.

    Returns:
        The directory of the data set.

    Raises:
        DataError: a source is missing, empty, no archive, or not the one that the data set was begun with.
        OutputError: the target cannot be written to, or has no room.
    """
    _check_options(name, held_out, min_side, shard_mib, workers)
    for path in (source, held_out) if isinstance(held_out, str) else (source,):
        with bucket_errors(path):
            exists = epath.Path(path).exists()
        if not exists:
            raise DataError(f"{path} does not exist; expected a directory, a .tar or a .tar.gz of pictures")
    directory = epath.Path(target) / name
    with writing(directory):
        try_out(directory)
    with (
        only_owner(directory, "build"),
        _scratch(directory) as scratch,
        # Without a name: a file of SQLite's own that goes with the connection.
        closing(sqlite3.connect("")) as database,
        ThreadPoolExecutor(workers) as pool,
    ):
        splits = _splits(database, source, held_out, scratch)
        final = directory / VERSION
        work = final if in_bucket(final) or final.exists() else directory / f".{VERSION}.incomplete"
        shards = _plan(work, name, splits, min_side, shard_mib, scratch if in_bucket(final) else Path(work))
        read = tqdm(pool.map(read_content, shards), "checksums", len(shards), unit=" shards")
        contents = dict(zip(shards, read, strict=True))
        missing = [shard for shard, content in contents.items() if content is None]
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are complete and match their checksums")
        _check_room(scratch, missing, at_once=not in_bucket(final))
        with tqdm(total=sum(len(shard.pictures) for shard in missing), unit=" pictures", desc="building") as bar:
            for shard in missing:
                contents[shard] = write_shard(shard, min_side, pool, 4 * workers, bar)
        by_split = {split: [contents[shard] for shard in shards if shard.split == split] for split in splits}
        if missing or work != final:
            _write_metadata(work, name, by_split)
        if work != final:
            with writing(final):
                work.rename(final)
    for split, parts in by_split.items():
        print(f"{split}: {Content.total(parts)}, in {len(parts)} shards")
    print(f"{final}: read it with --data.source=tfds --data.path={name} --data.data_dir={target}")
    return final


def _check_options(name: str, held_out: float | str, min_side: int, shard_mib: float, workers: int) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise DataError(f"--name {name}: expected lower-case letters, digits and underscores, such as my_photos")
    if name in tfds.list_builders(with_community_datasets=False):
        raise DataError(f"--name {name} is a data set that TFDS itself knows how to make; choose another name")
    if not isinstance(held_out, str) and not 0 < held_out < 1:
        raise DataError(f"--held-out {held_out}: expected a share between 0 and 1, or name pictures with --eval")
    if min_side < 0:
        raise DataError(f"--min-side {min_side}: expected zero or more, px")
    if shard_mib <= 0:
        raise DataError(f"--shard-mib {shard_mib}: expected a positive number")
    if workers < 1:
        raise DataError(f"--workers {workers}: expected at least 1")


@contextmanager
def _scratch(directory: epath.Path) -> Iterator[Path]:
    """A directory for unpacked archives; what a killed build left there is removed. For a bucket, a temporary one."""
    if in_bucket(directory):
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    scratch = Path(directory) / ".unpacked"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _splits(database: sqlite3.Connection, source: str, held_out: float | str, scratch: Path) -> dict[str, Pictures]:
    pictures = list_source(database, source, scratch / "source.tar")
    if isinstance(held_out, str):
        return {"train": pictures, "validation": list_source(database, held_out, scratch / "eval.tar")}
    count = max(1, round(held_out * len(pictures)))
    if count >= len(pictures):
        raise DataError(f"{source} holds too few pictures ({len(pictures)}) to hold any out; name those with --eval")
    return {"train": pictures[count:], "validation": pictures[:count]}


def _plan(
    work: epath.Path, name: str, splits: dict[str, Pictures], min_side: int, shard_mib: float, partials: Path
) -> list[Shard]:
    """The shards to write, each first in `partials`; raises DataError if others were begun in `work`."""
    plan: dict[str, Any] = {"minimum side": min_side}
    shards = []
    for split, pictures in splits.items():
        count = min(len(pictures), max(1, math.ceil(pictures.size / (shard_mib * 2**20))))
        plan |= {f"{split} pictures": len(pictures), f"{split} shards": count}
        plan[f"{split} names and sizes"] = pictures.digest()
        for i, path in enumerate(_template(work, name, split).sharded_filepaths(count)):
            part = pictures[i * len(pictures) // count : (i + 1) * len(pictures) // count]
            shards.append(Shard(split, epath.Path(path), part, partials / f".{path.name}.partial"))
    file = work / MANIFESTS / "plan.json"
    if not file.exists():
        if (work / "dataset_info.json").exists():
            raise DataError(f"{work} holds a data set that another command made; choose another --name or target")
        write_json(file, plan)
    begun = read_json(file)
    changes = [f"{key} {begun.get(key)}, now {plan[key]}" for key in plan if begun.get(key) != plan[key]]
    if changes:
        raise DataError(
            f"{work} was begun with another source or other options ({'; '.join(changes)}); "
            f"use those again, choose another --name, or remove the directory"
        )
    return shards


def _template(work: epath.Path, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(data_dir=work, dataset_name=name, split=split, filetype_suffix="array_record")


def _check_room(scratch: Path, shards: Sequence[Shard], *, at_once: bool) -> None:
    """Raises OutputError where the disk of `scratch` has no room for the shards, or for one after the other."""
    sizes = [shard.pictures.size for shard in shards]
    needed, free = sum(sizes) if at_once else max(sizes, default=0), shutil.disk_usage(scratch).free
    if needed > free:
        raise OutputError(
            f"{scratch.parent} has room for {free / 1e9:.1f} GB; the pictures take up to {needed / 1e9:.1f} GB"
        )


def _write_metadata(work: epath.Path, name: str, by_split: dict[str, list[Content]]) -> None:
    infos = []
    for split, parts in by_split.items():
        total = Content.total(parts)
        if not total.pictures:
            raise DataError(f"nothing is left for the {split} split: {total}")
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[part.pictures for part in parts],
                num_bytes=total.size,
                filename_template=_template(work, name, split),
            )
        )
    with writing(work):
        tfds.folder_dataset.write_metadata(
            data_dir=work, features=FEATURES, split_infos=infos, version=VERSION, check_data=False
        )


def check(target: str, name: str, *, workers: int = 1) -> None:
    """Verifies a data set that `build` completed: files, checksums and counts, and that training can use every record.

    Raises:
        DataError: there is no such data set, or it is damaged; the message says where.
    """
    directory = epath.Path(target) / name / VERSION
    with bucket_errors(directory):
        complete = (directory / MANIFESTS).is_dir() and (directory / "dataset_info.json").exists()
    if not complete:
        raise DataError(f"{directory} holds no complete data set of this command's; build it first")
    min_side = read_json(directory / MANIFESTS / "plan.json")["minimum side"]
    splits = tfds.builder_from_directory(directory).info.splits
    shards = [epath.Path(path) for split in splits.values() for path in split.filepaths]
    with ThreadPoolExecutor(workers) as pool:
        damages = [d for d in tqdm(pool.map(find_damage, shards), "checksums", len(shards), unit=" shards") if d]
        for split in () if damages else splits:
            counts = [read_json(manifest_of(epath.Path(path)))["count"] for path in splits[split].filepaths]
            if splits[split].shard_lengths != counts:
                damages.append(f"dataset_info.json counts other {split} pictures than the manifests")
                continue
            source = TFDS(DataConfig(source="tfds", path=name, data_dir=target, train_split=split), "train_split")
            reads = in_order(pool, partial(_use, source, min_side), range(len(source)), 4 * workers)
            for _, future in tqdm(reads, f"reading {split}", len(source), unit=" pictures"):
                if damage := future.result():
                    damages.append(damage)
    if damages:
        raise DataError(
            f"{directory} is damaged: {'; '.join(damages[:10])}{'; ...' if len(damages) > 10 else ''}. "
            "The command that built it writes missing and damaged shards anew"
        )
    whole = ", ".join(
        f"{split} {info.num_examples} pictures in {info.num_shards} shards" for split, info in splits.items()
    )
    print(f"{directory} is whole: {whole}; checksums match, every picture decodes")


def _use(source: TFDS, min_side: int, index: int) -> str | None:
    """What is wrong with a record."""
    try:
        image = source.read(index)
    except ImageError as error:
        return str(error)
    return f"{source.name(index)}: its shorter side is below {min_side} px" if min(image.shape[:2]) < min_side else None
