"""Addresses of buckets: what is said where the packages for them are missing, and where their service is silent."""

import importlib.util

import fsspec
import numpy as np
import pytest
from etils import epath

from asymvq_jax.__main__ import main
from asymvq_jax.config import Config, MaskConfig, RunConfig
from asymvq_jax.data.masks import random_mask
from asymvq_jax.data.sources import Files
from asymvq_jax.errors import CheckpointError, ExitCode, ImageError, UnansweredError, exit_code
from asymvq_jax.files.addresses import bucket_errors, is_unanswered
from asymvq_jax.training.checkpoints import RunCheckpoints

PICTURE = "gs://bucket/p.png"


@pytest.mark.parametrize(
    "words",
    [
        ["build-data", "--images=gs://b/p", "--out=x", "--name=n"],
        ["build-data", "--out=gs://b/p", "--name=n", "--check"],
        ["convert", "gs://b/run", "x"],
        ["convert", "tiny", "gs://b/x"],
        ["decode", "--latent=gs://b/z.npy", "--out=x.png"],
        ["evaluate", "--config=demo", "--json=gs://b/t.json"],
        ["evaluate", "--config=demo", "--pairs=gs://b/p"],
        ["export", "tiny", "gs://b/d.jax"],
        ["generate", "text", "x", "--prompt=a", "--out=gs://b/o.png"],
        ["inpaint", "--image=gs://b/p.png", "--mask=m.png", "--out=x.png"],
        ["masks", "gs://b/m.png"],
        ["page", "--checkpoint=gs://b/run"],
        ["plan", "--config=demo", "--json=gs://b/p.json"],
        ["score", "gs://b/p", "gs://b/q", "--inception=i.pth"],
        ["serve", "--checkpoint=gs://b/run"],
    ],
    ids=" ".join,
)
def test_every_command_names_the_package_that_is_missing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find(name, *rest))
    assert main(words) == ExitCode.WRONG_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "needs the package gcsfs; install it with: pip install gcsfs, or in a clone -e '.[gcs]'" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config=gs://b/c.py"], "--config gs://b/c.py: expected the name of a published configuration, or"),
        (["plan", "denoising", "--unet=gs://b/u"], "--unet gs://b/u is in a bucket; expected a path of this machine"),
        (["convert", "tiny", "gs://b/x", "--to=diffusers"], "expected a path of this machine: write it here, and copy"),
        (
            ["generate", "text", "gs://b/pipeline", "--prompt=a", "--out=o.png"],
            "only JAX checkpoints can be read: copy",
        ),
    ],
)
def test_what_is_read_from_disks_only_is_said(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    assert main(words) == ExitCode.WRONG_INPUT
    assert message in capsys.readouterr().err


class _Service:
    """A bucket's client that raises an error at every request."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def cat_file(self, name: str) -> bytes:
        raise self._error


def _http_error(code: int) -> Exception:
    return pytest.importorskip("gcsfs.retry").HttpError({"code": code, "message": "told"})


def _aiohttp_error() -> Exception:
    return pytest.importorskip("aiohttp").ServerDisconnectedError()


SILENT = [
    lambda: _http_error(503),
    lambda: _http_error(429),
    _aiohttp_error,
    ConnectionRefusedError,
    TimeoutError,
    lambda: ValueError("UNAVAILABLE: Connection refused"),
]


@pytest.mark.parametrize("make", SILENT)
def test_a_picture_that_a_silent_service_has_is_not_called_damaged(make, monkeypatch):
    """Else training would take another one in its place, and a mask likewise."""
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path: (_Service(make()), path))
    with pytest.raises(UnansweredError, match=r"gs://bucket/p\.png: the service does not answer") as error:
        Files([epath.Path(PICTURE)]).read(0)
    assert exit_code(error.value) == ExitCode.LOST_PEER
    masks = MaskConfig(strokes=0, boxes=0, files=1, path="gs://bucket", full_probability=0)
    with pytest.raises(UnansweredError):
        random_mask(np.random.default_rng(0), 16, masks, [epath.Path(PICTURE)])


def test_a_picture_that_a_service_refuses_is_named(monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path: (_Service(OSError("Forbidden: p.png")), path))
    with pytest.raises(ImageError, match="Forbidden"):
        Files([epath.Path(PICTURE)]).read(0)
    with pytest.raises(OSError, match="told, 401"), bucket_errors(PICTURE):
        raise _http_error(401)


@pytest.mark.parametrize("make", SILENT)
def test_a_checkpoint_that_a_silent_service_does_not_take_is_worth_another_try(make):
    saved = object.__new__(RunCheckpoints)
    saved._config = Config(run=RunConfig(directory="gs://bucket/run", train_encoder=True))
    message = r"a checkpoint cannot be written: .*start again to resume"
    with pytest.raises(UnansweredError, match=message), saved._writing():
        raise make()
    with pytest.raises(CheckpointError), saved._writing():
        raise OSError(28, "No space left on device")


def test_the_cause_is_found_behind_other_errors():
    error = RuntimeError("not written")
    error.__context__ = TimeoutError()
    assert is_unanswered(error)
    assert not is_unanswered(OSError(28, "No space left on device"))
