"""A folder that holds what pictures are packed in: the message says what that is, and what to do."""

import pytest

from asymvq_jax.data.sources import list_pictures
from asymvq_jax.errors import DataError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00000.tar", "is an archive: asymvq build-data packs it"),
        ("Photos.ZIP", "is an archive: unpack it first"),
        ("train-00000-of-00001.parquet", "is a table or database: write its pictures"),
        ("set-train.tfrecord-00000-of-00002", "is a shard of a data set: name it by data.source=tfds"),
        ("clip.mp4", "is a video: write its frames"),
        ("IMG_1.NEF", "is a camera's raw picture: develop it"),
    ],
)
def test_packed_pictures_are_called_what_they_are(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\0\1")
    with pytest.raises(
        DataError, match=rf"^data\.path='.*' holds no pictures \(found 1 other files\).*{name} {message}"
    ):
        list_pictures(str(tmp_path), "data.path")
    with pytest.raises(DataError, match=rf"{name}' is a file; expected a directory of pictures; {name} {message}"):
        list_pictures(str(tmp_path / name), "data.path")
