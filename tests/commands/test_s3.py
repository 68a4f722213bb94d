"""Pictures in s3://, tried against moto's server on this machine; checkpoints are refused there."""

import dataclasses

import boto3
import numpy as np
import pytest
from etils import epath
from moto.server import ThreadedMotoServer
from test_buckets import SIDE, config

from asymvq_jax.__main__ import main
from asymvq_jax.data.sources import open_sources
from asymvq_jax.errors import ConfigError
from asymvq_jax.files import images
from asymvq_jax.models.checkpoints import load_model
from asymvq_jax.training.loop import train

PICTURES = 8


@pytest.fixture(scope="module")
def bucket():
    """s3://bucket with pictures and a mask."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    root, rng = epath.Path("s3://bucket"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        for i in range(PICTURES):
            picture = rng.integers(0, 256, (SIDE + 4, SIDE + i, 3), np.uint8)
            images.write(root / "photos" / ("sub/" * (i % 2)) / f"p{i}.png", picture)
        mask = np.zeros((SIDE + 4, SIDE, 3), np.uint8)
        mask[4:12, 4:12] = 255
        images.write(root / "mask.png", mask)
        yield root
    server.stop()


def test_a_folder_of_pictures_is_read(bucket):
    sources = open_sources(dataclasses.replace(config().data, path="s3://bucket/photos"))
    names = sorted(half.name(i) for half in sources for i in range(len(half)))
    assert names == sorted(f"s3://bucket/photos/{'sub/' * (i % 2)}p{i}.png" for i in range(PICTURES))
    assert {half.read(0).shape[0] for half in sources} == {SIDE + 4}


def test_inpaint_reads_and_writes_there(bucket):
    words = ["--image", "s3://bucket/photos/p0.png", "--mask", "s3://bucket/mask.png", "--keep", "exact"]
    assert main(["inpaint", *words, "--blend", "none", "--out", "s3://bucket/out.png"]) == 0
    picture, mask, result = (images.read(bucket / name) for name in ("photos/p0.png", "mask.png", "out.png"))
    np.testing.assert_array_equal((result != picture).any(-1), mask[..., 0] > 0)


def test_checkpoints_are_refused_before_anything_else(tmp_path, monkeypatch, capsys):
    # Else a folder of this name would be made here.
    monkeypatch.chdir(tmp_path)
    message = "Orbax cannot keep checkpoints at s3://; expected a path of this machine"
    with pytest.raises(ConfigError, match=f"run.directory='s3://bucket/run': {message}"):
        train(config(directory="s3://bucket/run"))
    with pytest.raises(ConfigError, match=message):
        load_model("s3://bucket/model")
    assert main(["convert", "--checkpoint", "nothing.ckpt", "--out", "s3://bucket/model"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
