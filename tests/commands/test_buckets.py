"""Every path that a command takes may lie in a bucket (gs://...): tried against a server on this machine."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto import event_pb2

from asymvq_jax.__main__ import main
from asymvq_jax.config import Config, DataConfig, LossConfig, MaskConfig, ModelConfig, OptimizerConfig, RunConfig
from asymvq_jax.data import pipeline
from asymvq_jax.data.sources import open_sources
from asymvq_jax.devices import cluster
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.evaluation.metrics import distribution
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, load_parameters, save_model
from asymvq_jax.training.loop import train

MODEL = ModelConfig(
    encoder_channels=(8, 8), decoder_channels=(8, 8), encoder_blocks=1, decoder_blocks=1, norm_groups=4,
    mid_attention=False,
)  # fmt: skip
SIDE = 16

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    # This process has used its devices already, and can join no others.
    monkeypatch.setattr(cluster, "join", lambda: None)


@pytest.fixture(scope="module")
def bucket(storage):
    """gs://bucket with pictures, masks, pairs of both, and a first stage to train from."""
    root = epath.Path("gs://bucket")
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = rng.integers(0, 256, (SIDE + 4, SIDE + i, 3), np.uint8)
        mask = np.zeros_like(picture)
        mask[4:12, 4:12] = 255
        images.write(root / "photos" / ("sub/" * (i % 2)) / f"p{i}.png", picture)
        images.write(root / "masks" / f"m{i}.png", mask)
        if i < 2:
            images.write(root / "pairs" / f"p{i}.png", picture)
            images.write(root / "pairs" / f"p{i}_mask.png", mask)
    (root / "photos" / ".hidden.png").write_bytes(b"no picture")
    (root / "photos" / "notes.txt").write_bytes(b"no picture")
    save_model("gs://bucket/first", Autoencoder(dataclasses.replace(MODEL, condition=False), rngs=nnx.Rngs(0)))
    return root


def config(**changes) -> Config:
    run = {"directory": "gs://bucket/run", "init_from": "gs://bucket/first", "steps": 2, "log_every": 1}
    run |= {"eval_every": 1, "eval_pictures": 8, "keep": 1}
    masks = MaskConfig(strokes=0, boxes=0, files=1, path="gs://bucket/masks", full_probability=0)
    return Config(
        run=RunConfig(**(run | changes)),
        model=MODEL,
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0),
        data=DataConfig(image_size=SIDE, batch_size=8, source="folder", path="gs://bucket/photos", mask=masks),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2),
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A file for --config."""
    file = tmp_path_factory.mktemp("config") / "bucket.py"
    file.write_text("from test_buckets import config\n\ndef get_config():\n    return config()\n")
    return str(file)


@pytest.fixture(scope="module")
def trained(bucket, config_file):
    """A run of two steps in the bucket."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "join", lambda: None)
        assert main(["train", f"--config={config_file}"]) == 0
    return bucket / "run"


def events(folder) -> list[event_pb2.Event]:
    """All events of TensorBoard's files."""
    found = []
    for file in sorted(folder.glob("events.*"), key=lambda path: path.name):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


# gcsfs hands the trace, of more than 1 MiB, to aiohttp as bytes.
@pytest.mark.filterwarnings("ignore:Sending a large body")
def test_a_run_lives_in_a_bucket_and_resumes_there(trained, caplog):
    caplog.set_level("INFO", "asymvq_jax")
    assert {p.name for p in (trained / "checkpoints").iterdir()} <= {"1", "2"}
    assert train(config(steps=3, profile_steps="2:3")) == 0
    assert list((trained / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))
    assert "resuming gs://bucket/run at step 2" in caplog.text
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "l1" in line] == [1, 2, 3]
    assert images.read(trained / "pictures" / "00000003.png").ndim == 3
    tags = [(e.step, value.tag) for e in events(trained / "tensorboard") for value in e.summary.value]
    assert [step for step, tag in tags if tag == "l1"] == [1, 2, 3]
    assert [step for step, tag in tags if tag == "pictures"] == [1, 2, 3]
    assert (trained / "checkpoints" / "3").exists()


def test_a_picture_is_read_with_one_request(bucket, storage):
    storage.forget()
    assert images.read("gs://bucket/photos/p0.png").shape == (SIDE + 4, SIDE, 3)
    assert storage.requests.total() == 1


def test_the_pictures_of_a_folder_are_listed_with_few_requests(bucket, storage, caplog):
    storage.forget()
    caplog.set_level("INFO", "asymvq_jax")
    train_half, held_out = open_sources(config().data)
    assert len(train_half) + len(held_out) == 8
    assert storage.requests.total() < 8
    names = [train_half.name(i) for i in range(len(train_half))]
    assert {name.rsplit("/", 1)[0] for name in names} == {"gs://bucket/photos", "gs://bucket/photos/sub"}
    assert "1 hidden (the name begins with a dot), such as .hidden.png" in caplog.text
    assert "1 not pictures (1 .txt), such as notes.txt" in caplog.text


def test_other_processes_take_the_first_ones_list_without_a_request(bucket, storage):
    lists = []

    def first(work):
        lists.append(work())
        return lists[-1]

    data = config().data
    listed = pipeline.open_inputs(data, once=first)
    storage.forget()
    told = pipeline.open_inputs(data, once=lambda work: lists.pop(0))
    assert storage.requests.total() == 0
    assert told.identities(data) == listed.identities(data)


def test_evaluation_reads_and_writes_there(trained, config_file):
    shared = ["evaluate", f"--config={config_file}", "--checkpoint=gs://bucket/run"]
    words = [*shared, "--pairs=gs://bucket/pairs"]
    assert main([*words, "--json=gs://bucket/out/t.json", "--picture=gs://bucket/out/grid.png"]) == 0
    numbers = json.loads(epath.Path("gs://bucket/out/t.json").read_text())
    assert numbers["pictures"] == 2
    assert images.read("gs://bucket/out/grid.png").ndim == 3
    whole = ["--pictures=gs://bucket/photos", "--seam-pictures=1", f"--seam-size={SIDE}"]
    assert main([*shared, *whole, "--seam=gs://bucket/out/seam.png", "--json=gs://bucket/out/seam.json"]) == 0
    assert images.read("gs://bucket/out/seam.png").ndim == 3


def test_a_plan_is_written_there(config_file):
    assert main(["plan", f"--config={config_file}", "--json=gs://bucket/out/plan.json"]) == 0
    assert json.loads(epath.Path("gs://bucket/out/plan.json").read_text())


def test_inpainting_reads_and_writes_there(trained, tmp_path, capsys):
    height, width = images.read("gs://bucket/pairs/p0.png").shape[:2]
    latent = np.random.default_rng(0).normal(size=(4, -(-height // 2), -(-width // 2))).astype(np.float32)
    np.save(tmp_path / "z.npy", latent)
    epath.Path("gs://bucket/z.npy").write_bytes((tmp_path / "z.npy").read_bytes())
    words = ["inpaint", "--image=gs://bucket/pairs/p0.png", "--mask=gs://bucket/pairs/p0_mask.png"]
    words += ["--latent=gs://bucket/z.npy", "--checkpoint=gs://bucket/run", "--keep=exact", "--blend=none"]
    assert main([*words, "--out=gs://bucket/out/o.png"]) == 0, capsys.readouterr().err
    before, after = images.read("gs://bucket/pairs/p0.png"), images.read("gs://bucket/out/o.png")
    np.testing.assert_array_equal(after[:4], before[:4])
    assert (after[4:12, 4:12] != before[4:12, 4:12]).any()
    assert main([*words, "--out=gs://bucket/pairs/p0.png"]) == 2
    assert "which would be overwritten" in capsys.readouterr().err


def test_models_are_converted_from_and_to_there(trained, tmp_path, capsys):
    assert main(["convert", "gs://bucket/run", "gs://bucket/copy"]) == 0
    (_, there), (_, copy) = load_parameters("gs://bucket/run"), load_parameters("gs://bucket/copy")
    for name, value in there.items():
        np.testing.assert_array_equal(copy[name], value)
    assert main(["convert", "gs://bucket/copy", "gs://bucket/copy"]) == 2
    assert "gs://bucket/copy exists already" in capsys.readouterr().err
    # A checkpoint that was not completed.
    epath.Path("gs://bucket/copy/commit_success.txt").unlink()
    assert main(["convert", "gs://bucket/copy", str(tmp_path / "a")]) == 2
    assert "gs://bucket/copy holds no model checkpoint" in capsys.readouterr().err
    assert main(["convert", "gs://bucket/run", "gs://bucket/a", "--to=diffusers"]) == 2
    assert "--out gs://bucket/a is in a bucket; expected a path of this machine" in capsys.readouterr().err


def test_data_sets_are_built_from_there_to_there(bucket, capsys):
    words = ["build-data", "--images=gs://bucket/photos", "--out=gs://bucket/tfds", "--name=mine", "--held-out=0.25"]
    assert main([*words, "--shard-mib=0.001", "--workers=2"]) == 0
    # Again: all shards are there.
    assert main([*words, "--shard-mib=0.001", "--workers=2"]) == 0
    assert re.search(r"(\d+) of \1 shards are complete", capsys.readouterr().out)
    assert main(["build-data", "--out=gs://bucket/tfds", "--name=mine", "--check"]) == 0
    assert "is whole: train 6 pictures" in capsys.readouterr().out
    sources = open_sources(DataConfig(source="tfds", path="mine", data_dir="gs://bucket/tfds"))
    read = [source.read(i) for source in sources for i in range(len(source))]
    files = [path for folder in ("photos", "photos/sub") for path in (bucket / folder).glob("p*.png")]
    assert {picture.tobytes() for picture in read} == {images.read(path).tobytes() for path in files}


def test_other_outputs_go_there(bucket, capsys, monkeypatch):
    assert main(["masks", "--out=gs://bucket/out/masks.png"]) == 0
    assert images.read("gs://bucket/out/masks.png").ndim == 3
    distribution.save_statistics("gs://bucket/out/s.npz", np.random.default_rng(0).normal(size=(8, 3)))
    assert distribution.load_statistics("gs://bucket/out/s.npz")[1].shape == (8, 3)
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    try:
        compilation_cache.reset_cache()
        jax.config.update(name, "gs://bucket/cache")
        keep_compiled_programs()
        jax.jit(lambda x: x * 3 + 1)(np.arange(7.0, dtype=np.float32)).block_until_ready()
        assert [path.name for path in epath.Path("gs://bucket/cache").iterdir() if path.name.startswith("jit_")]
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["masks", "--out=gs://none/m.png"], "gs://none/m.png cannot be written: no such bucket"),
        (["inpaint", "--image=gs://none/a.png", "--mask=b.png", "--out=c.png"], "no picture at gs://none/a.png"),
        (["evaluate", "--config=demo", "--pairs=gs://none/p"], "--pairs gs://none/p does not exist"),
        (["convert", "gs://none/run", "x"], "no checkpoint at gs://none/run"),
        (["train", "--run.directory=gs://none/run"], "run.directory='gs://none/run' is not writable: no such bucket"),
        (["train", "--data.path=gs://none/photos"], "data.path='gs://none/photos' does not exist"),
        (["train", "--run.directory=gs://bucket/new", "--run.init_from=gs://none/f"], "run.init_from='gs://none/f': "),
        (["train", "--run.directory=gs://bucket/n", "--loss.perceptual_weight=1",
          "--loss.perceptual_weights=gs://bucket/v.pth"], "gs://bucket/v.pth is in a bucket; expected a path of this"),
        (["build-data", "--images=gs://none/p", "--out=gs://bucket/q", "--name=n"], "gs://none/p does not exist"),
        (["build-data", "--images=gs://bucket/photos", "--out=gs://none/q", "--name=n"], "gs://none/q/n cannot be"),
    ],
)  # fmt: skip
def test_a_wrong_bucket_is_one_line(bucket, storage, config_file, tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [words[0], f"--config={config_file}", *words[1:]] if words[0] == "train" else words
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    _, _, answer = storage.ask("GET", "/storage/v1/b?project=p")
    assert [each["name"] for each in json.loads(answer)["items"]] == ["bucket"]


@pytest.mark.parametrize("words", [["masks", "--out=gs://bucket/new.png"], ["convert", "gs://bucket/first", "x"]])
def test_no_permission_is_one_line(bucket, storage, tmp_path, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.fault = lambda method, path: 403
    try:
        assert main(words) == 2
    finally:
        storage.forget()
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "Forbidden" in error


def test_models_are_read_as_anywhere(bucket):
    assert load_model("gs://bucket/first").config.encoder_channels == (8, 8)
    assert Path("gs:").exists() is False
