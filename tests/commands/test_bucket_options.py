"""Options that name a place in a bucket (gs://...) beside those of `test_buckets`."""

import io
import json
import tarfile

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from test_buckets import MODEL

from asymvq_jax.__main__ import main
from asymvq_jax.diffusion.jobs import list_jobs
from asymvq_jax.diffusion.settings import Inpaint
from asymvq_jax.evaluation.metrics import distribution, inception
from asymvq_jax.evaluation.pairs import list_latents, read_latent
from asymvq_jax.evaluation.pictures import read_pictures
from asymvq_jax.evaluation.seam_report import TOGETHER, plot
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.training.checkpoints import move_folder

SIDE, COUNT = 32, 3
ROOT = "gs://bucket/options"

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def bucket(storage):
    """Pictures, pairs with prompts, edits, latents, archives, and a model."""
    storage.forget()
    root, rng, archive = epath.Path(ROOT), np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for i in range(COUNT):
            picture = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            mask = np.zeros_like(picture)
            mask[8:20, 8:20] = 255
            images.write(root / "photos" / f"p{i}.png", picture)
            images.write(root / "pairs" / f"p{i}.png", picture)
            images.write(root / "pairs" / f"p{i}_mask.png", mask)
            (root / "pairs" / f"p{i}.txt").write_bytes(b"a fox")
            images.write(root / "edits" / f"e{i}.png", 255 - picture)
            images.write(root / "edits" / f"e{i}_mask.png", mask)
            data = (root / "photos" / f"p{i}.png").read_bytes()
            entry = tarfile.TarInfo(f"p{i}.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    # Of the last picture.
    images.write(root / "edited.png", np.where(mask > 0, np.uint8(0), picture))
    (root / "photos.tar.gz").write_bytes(archive.getvalue())
    latents = io.BytesIO()
    np.save(latents, rng.normal(size=(2, 4, SIDE // 2, SIDE // 2)).astype(np.float32))
    (root / "latents" / "z.npy").write_bytes(latents.getvalue())
    save_model(f"{ROOT}/model", Autoencoder(MODEL, rngs=nnx.Rngs(0)))
    return root


def test_decode_and_export_read_and_write_there(bucket):
    words = ["decode", f"--checkpoint={ROOT}/model", f"--latent={ROOT}/latents/z.npy", "--latent-scaled=yes"]
    assert main([*words, "--latent-layout=channels-first", f"--out={ROOT}/decoded"]) == 0
    assert {path.name for path in (bucket / "decoded").iterdir()} == {"0000.png", "0001.png"}
    assert main(["export", f"{ROOT}/model", f"{ROOT}/decoder.jax", f"--size={SIDE}x{SIDE}"]) == 0
    jax.export.deserialize(bytearray((bucket / "decoder.jax").read_bytes()))


@pytest.mark.parametrize(
    "edit", [[f"--edited={ROOT}/edited.png", f"--save-mask={ROOT}/m.png"], [f"--edits={ROOT}/edits"]]
)
def test_edited_pictures_are_read_there(bucket, edit, capsys):
    words = ["inpaint", f"--checkpoint={ROOT}/model", f"--image={ROOT}/photos/p{COUNT - 1}.png", *edit]
    assert main([*words, f"--out={ROOT}/e.png"]) == 0, capsys.readouterr().err
    assert images.read(bucket / "e.png").shape == (SIDE, SIDE, 3)
    if len(edit) == 2:
        assert images.read_mask(bucket / "m.png").any()


def test_data_sets_are_built_from_archives_there(bucket, capsys):
    words = ["build-data", f"--images={ROOT}/photos.tar.gz", f"--eval={ROOT}/photos", f"--out={ROOT}/tfds", "--name=n"]
    assert main([*words, "--workers=1"]) == 0
    assert main(["build-data", f"--out={ROOT}/tfds", "--name=n", "--check", "--workers=1"]) == 0
    assert f"train {COUNT} pictures" in capsys.readouterr().out


def test_generate_lists_its_jobs_there(bucket):
    options = Inpaint(pipeline="", folder=f"{ROOT}/pairs", out=f"{ROOT}/made", save_latents=f"{ROOT}/made_latents")
    jobs = list_jobs(options)
    assert [str(job.out) for job in jobs] == [f"{ROOT}/made/p{i}.png" for i in range(COUNT)]
    assert {(job.prompt, job.image, job.mask) for job in jobs[:1]} == {
        ("a fox", f"{ROOT}/pairs/p0.png", f"{ROOT}/pairs/p0_mask.png")
    }


def test_scores_and_whole_pictures_are_read_and_written_there(bucket, monkeypatch):
    def network(params, pictures):
        x = pictures.reshape(-1, 299, 299, 3)[:, :298, :298].reshape(-1, 2, 149, 2, 149, 3).mean((2, 4))
        return x.reshape(-1, 12), x.reshape(-1, 12) / 50

    monkeypatch.setattr(distribution, "inception", network)
    monkeypatch.setattr(inception, "load_inception", lambda path: {})
    words = ["score", f"{ROOT}/photos", f"{ROOT}/edits", "--inception=none", "--batch=8", f"--json={ROOT}/s.json"]
    assert main([*words, f"--save-statistics={ROOT}/s.npz"]) == 0
    fid = json.loads((bucket / "s.json").read_text())["fid"]
    assert main(["score", f"{ROOT}/photos", f"{ROOT}/s.npz", "--inception=none", "--batch=8"]) == 0
    assert fid > 0
    assert len(read_pictures(f"{ROOT}/photos", COUNT, SIDE)) == COUNT
    (latent,) = list_latents(f"{ROOT}/latents")
    assert read_latent(latent).values.shape == (2, 4, SIDE // 2, SIDE // 2)
    row = {name: {"mean": 1.0} for name in ("tone", "step")} | {"psnr_preserved": {"mean": np.inf}}
    plot(f"{ROOT}/seam.png", {"masks": {"paste": row}, TOGETHER: {"paste": row}})
    assert images.read(bucket / "seam.png").ndim == 3


def test_a_damaged_step_is_put_aside_there(bucket):
    (bucket / "steps" / "3" / "model" / "a").write_bytes(b"a")
    (bucket / "steps" / "3" / "b").write_bytes(b"b")
    move_folder(bucket / "steps" / "3", bucket / "damaged" / "3")
    assert not (bucket / "steps" / "3" / "b").exists()
    assert (bucket / "damaged" / "3" / "model" / "a").read_bytes() == b"a"
    assert (bucket / "damaged" / "3" / "b").read_bytes() == b"b"
