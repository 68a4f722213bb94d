"""Metrics against their formulas, and the evaluation's rows, folders and messages."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from processes import ROOT
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from asymvq_jax.commands.evaluate import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import EvaluationError
from asymvq_jax.evaluation import drift
from asymvq_jax.evaluation.metrics.distribution import statistics
from asymvq_jax.evaluation.metrics.image import all_metrics, boundary_band, boundary_error
from asymvq_jax.evaluation.pairs import Pair, list_pairs, read_pairs
from asymvq_jax.evaluation.rows import (
    evaluate,
    evaluate_text,
    paper_table,
    table,
    text_table,
)
from asymvq_jax.files import images
from asymvq_jax.inference.blend import composite
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.models.parameters import merge, seeded, split

CONFIG = ModelConfig(encoder_channels=(32, 32, 32), decoder_channels=(32, 32, 32), encoder_blocks=1, decoder_blocks=1)


def _picture(seed=0, height=40, width=48):
    rng = np.random.default_rng(seed)
    image = images.to_uint8(np.clip(rng.normal(size=(height, width, 3)).cumsum(1).cumsum(0) / 60, -1, 1))
    mask = np.zeros((height, width, 1), np.float32)
    mask[8:30, 10:30] = 1
    return image, mask


def test_metrics_are_their_formulas_in_their_regions():
    original, mask = _picture()
    image = original.copy()
    kept = mask[..., 0] == 0
    image[kept] = np.clip(image[kept].astype(int) + 4, 0, 255).astype(np.uint8)
    measured = all_metrics(image, original, mask)
    difference = (image.astype(float) - original.astype(float)) / 127.5
    np.testing.assert_allclose(measured["preservation_error"], np.square(difference[kept]).mean())
    assert measured["psnr_masked"] == np.inf
    expected = peak_signal_noise_ratio(original[kept], image[kept], data_range=255)
    np.testing.assert_allclose(measured["psnr_preserved"], expected)
    _, full = structural_similarity(original, image, channel_axis=-1, full=True, data_range=255)
    # Where the window of 7 px holds kept pixels only.
    within = np.ones_like(kept)
    within[8 - 3 : 30 + 3, 10 - 3 : 30 + 3] = False
    np.testing.assert_allclose(measured["ssim_preserved"], full.mean(-1)[within].mean())
    np.testing.assert_allclose(measured["ssim_masked"], full.mean(-1)[~kept].mean())


def test_empty_regions_are_not_numbers():
    original, mask = _picture()
    full = all_metrics(original, original, np.ones_like(mask))
    assert np.isnan([full["preservation_error"], full["psnr_preserved"], full["boundary_error"]]).all()
    assert np.isnan(all_metrics(original, original, np.zeros_like(mask))["psnr_masked"])


def test_boundary_error_sees_a_step_and_only_at_the_mask():
    original, mask = _picture()
    original = np.full_like(original, 100)
    band = boundary_band(mask)
    assert band[20, 6:14].all()
    assert not band[20, [4, 5, 14, 15]].any()
    stepped = np.where(mask > 0, np.uint8(120), original)
    assert boundary_error(stepped, original, mask) > 0
    assert boundary_error(original + np.uint8(20), original, mask) == 0
    elsewhere = original.copy()
    elsewhere[:, 40:] += np.uint8(50)
    assert boundary_error(elsewhere, original, mask) == 0


@pytest.mark.parametrize("where", ["inside", "corner", "odd"])
def test_poisson_blend_does_not_shift_the_picture(where):
    original, mask = _picture()
    # Smooth, since the solution has no gradient across the mask's edge.
    original = cv2.GaussianBlur(original, (0, 0), 12)
    mask[:] = 0
    region = {"inside": np.s_[8:30, 10:30], "corner": np.s_[0:13, 0:18], "odd": np.s_[7:30, 9:30]}[where]
    mask[region] = 1
    # Cloning a picture's own region changes next to nothing, unless it lands elsewhere.
    blended = composite(original, original, mask, "poisson")
    assert np.abs(blended.astype(int) - original.astype(int)).max() <= 2
    np.testing.assert_array_equal(composite(original, original[::-1], np.zeros_like(mask), "poisson"), original[::-1])
    np.testing.assert_array_equal(composite(original, original[::-1], np.ones_like(mask), "poisson"), original)


def test_similarity_kept_does_not_depend_on_what_is_masked():
    original, mask = _picture()
    pasted = np.where(mask > 0, np.uint8(0), original)
    assert all_metrics(pasted, original, mask)["ssim_preserved"] == pytest.approx(1)
    # No kept pixel is far enough from the masked ones.
    stripes = np.zeros_like(mask)
    stripes[::4] = 1
    assert np.isnan(all_metrics(pasted, original, stripes)["ssim_preserved"])


@pytest.fixture(scope="module")
def models():
    model = Autoencoder(CONFIG, rngs=nnx.Rngs(0))
    _, params = split(model)
    plain_config = dataclasses.replace(CONFIG, condition=False)
    graphdef, shapes = split(nnx.eval_shape(lambda: Autoencoder(plain_config, rngs=seeded(0))))
    return model, merge(graphdef, {name: params[name] for name in shapes})


def _pairs(count=2):
    return [Pair(str(i), *_picture(i)) for i in range(count)]


def test_rows_stand_side_by_side(models):
    model, plain = models
    results = evaluate(model, plain, iter(_pairs()), 2, load_lpips("alexnet"))
    assert list(results.rows) == ["plain", "paste", "Poisson", "ours", "ours + paste"]
    assert results.pictures == 2
    for row in ("paste", "ours + paste"):
        assert results.rows[row]["preservation_error"] == 0
        assert results.rows[row]["psnr_preserved"] == np.inf
    assert results.rows["plain"]["psnr_masked"] == results.rows["paste"]["psnr_masked"]
    assert results.rows["ours"]["preservation_error"] > 0
    assert results.counts["ours"]["boundary_error"] == 2
    assert "| ours + paste |" in table(results)
    # The table shows each number times what its title says.
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table(results).splitlines())
    shown = {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}
    for row, metrics in results.rows.items():
        assert float(shown[row]["preservation error x 1e-5"]) == pytest.approx(
            100_000 * metrics["preservation_error"], rel=1e-3
        )
        assert float(shown[row]["boundary error x 1e-3"]) == pytest.approx(1000 * metrics["boundary_error"], rel=1e-3)
        assert float(shown[row]["LPIPS"]) == pytest.approx(metrics["lpips"], rel=1e-3)
    assert results.grid().shape[1] == 8 * 3 * 48 + 7 * 4


def test_without_a_plain_autoencoder_the_row_says_so(models):
    results = evaluate(models[0], None, iter(_pairs(1)), 1, load_lpips("alexnet"))
    assert next(iter(results.rows)) == "plain (ours, no condition)"


def test_another_encoder_is_refused(models):
    other = Autoencoder(CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(EvaluationError, match=r"has another encoder \(\d+ parameters differ"):
        evaluate(models[0], other, iter(_pairs(1)), 1, load_lpips("alexnet"))


def _write_pairs(folder: Path) -> None:
    for i, (height, width) in enumerate(((37, 51), (40, 48))):
        image, mask = _picture(i, height, width)
        images.write(folder / f"p{i}.png", image)
        Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).save(folder / f"p{i}_mask.png")


def test_folders_of_pairs(tmp_path):
    with pytest.raises(EvaluationError, match="does not exist"):
        list_pairs(str(tmp_path / "none"))
    with pytest.raises(EvaluationError, match="holds no pictures"):
        list_pairs(str(tmp_path))
    _write_pairs(tmp_path)
    pairs = list(read_pairs(list_pairs(str(tmp_path))))
    assert [p.image.shape for p in pairs] == [(37, 51, 3), (40, 48, 3)]
    assert set(np.unique(pairs[0].mask)) == {0, 1}
    (tmp_path / "p0_mask.png").rename(tmp_path / "q_mask.png")
    with pytest.raises(EvaluationError, match=re.escape("missing p0_mask (for p0.png), q (for q_mask.png)")):
        list_pairs(str(tmp_path))
    (tmp_path / "q_mask.png").unlink()
    Image.new("L", (5, 6)).save(tmp_path / "p0_mask.png")
    with pytest.raises(EvaluationError, match=re.escape("p0.png is 51 x 37 px and p0_mask.png is 5 x 6 px")):
        list(read_pairs(list_pairs(str(tmp_path))))


def test_command_line(tmp_path, models, capsys, monkeypatch):
    # As many as show what is printed and written.
    monkeypatch.setattr(drift, "EDITS", 2)
    monkeypatch.setattr(drift, "SHOWN_EDITS", (1, 2))
    monkeypatch.setattr(drift, "PASSES", 2)
    monkeypatch.setattr(drift, "SHOWN_PASSES", (1, 2))
    save_model(tmp_path / "model", models[0])
    save_model(tmp_path / "plain", models[1])
    (tmp_path / "pairs").mkdir()
    _write_pairs(tmp_path / "pairs")
    options = {
        "checkpoint": "model",
        "plain": "plain",
        "pairs": "pairs",
        "json": "t.json",
        "picture": "grid.png",
        "seam": "seam.png",
        "harmonised": "model",
    }
    arguments = [f"--{name}={tmp_path / value}" for name, value in options.items()]
    arguments += [f"--config={ROOT / 'configs/demo.py'}", "--seam-pictures=1", "--seam-size=24"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 pictures from" in said
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["rows"]["paste"]["preservation_error"] == 0
    assert numbers["rows"]["paste"]["psnr_preserved"] is None
    assert numbers["seam"]["shifted"]["paste"]["psnr_preserved"]["mean"] is None
    assert len(numbers["drift"]["ours"]) == 2
    assert len(numbers["edits"]["ours + paste"]) == 2
    assert "the seam, own: 1 pictures" in said
    # One picture, three masks, five protocols, 17 rows, each with its numbers.
    assert len(numbers["seam_cases"]) == 3 * 5 * 17
    assert numbers["seam_cases"][0]["values"]["lpips"] > 0
    assert images.read(tmp_path / "grid.png").shape[1] == 8 * 3 * 51 + 7 * 4
    assert (tmp_path / "seam.png").is_file()


def test_command_line_messages(tmp_path, models, capsys):
    for name, each in zip(("model", "plain"), models, strict=True):
        save_model(tmp_path / name, each)
    model, plain = f"--checkpoint={tmp_path / 'model'}", f"--plain={tmp_path / 'plain'}"
    seam = f"--seam={tmp_path / 's.png'}"
    for bad, message in (
        (["--checkpoint=none"], "no checkpoint at none"),
        (["--checkpoint=x", "--json=t.txt"], "t.txt"),
        ([model, "--plain=none"], "--plain none, the plain autoencoder: no checkpoint at none"),
        ([model, "--run.init_from=none"], "run.init_from='none' of the config (or name one by --plain), the plain"),
        (
            [model, "--harmonised=x"],
            "--pictures and --harmonised belong to the benchmark of seams; add --seam PLOT.png",
        ),
        ([model, plain, seam, "--harmonised=x"], "--harmonised x: no checkpoint at x"),
        ([model, seam, "--seam-pictures=0"], "--seam-pictures and --seam-size: expected 1 or more"),
        ([model, seam, "--pictures=none"], "--pictures none does not exist"),
        ([model, plain, seam, "--against=none"], "--against 'none': expected one of plain, paste, "),
    ):
        assert main([f"--config={ROOT / 'configs/demo.py'}", *bad]) == 2
        said = capsys.readouterr().err
        assert f"error: {message}" in said
        assert "Traceback" not in said
    command = [sys.executable, ROOT / "eval.py", f"--config={ROOT / 'configs/demo.py'}", "--checkpoint=none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: no checkpoint at none" in done.stderr


def test_edited_latents_beside_the_pairs_are_decoded(models, tmp_path):
    _write_pairs(tmp_path)
    latent = np.random.default_rng(0).normal(size=(4, 10, 13)).astype(np.float32)
    np.save(tmp_path / "p0.npy", latent)
    with pytest.raises(
        EvaluationError, match=re.escape("p1.npy is missing; expected a latent of every picture or none")
    ):
        list_pairs(str(tmp_path))
    np.save(tmp_path / "p1.npy", latent[:, :, :12])
    own, edited = ([p if keep else dataclasses.replace(p, latent=None) for p in read_pairs(list_pairs(str(tmp_path)))]
                   for keep in (False, True))  # fmt: skip
    rows = [evaluate(*models, iter(p), 2, load_lpips("alexnet")).rows for p in (own, edited)]
    assert rows[0]["plain"]["psnr_masked"] != rows[1]["plain"]["psnr_masked"]
    np.save(tmp_path / "p1.npy", latent)
    with pytest.raises(EvaluationError, match=r"the latent beside p1\.png: the latent has shape \(4, 10, 13\)"):
        evaluate(*models, read_pairs(list_pairs(str(tmp_path))), 2, load_lpips("alexnet"))
    (tmp_path / "p0.npy").write_bytes(b"none")
    with pytest.raises(EvaluationError, match=r"p0\.npy is not a PyTorch checkpoint, but a text"):
        list(read_pairs(list_pairs(str(tmp_path))))


@pytest.fixture
def inception(monkeypatch):
    """In the place of Inception: means of 2 x 2 parts of the picture, as features and as logits."""

    def network(params, images):
        x = images.reshape(-1, 299, 299, 3)[:, :298, :298].reshape(-1, 2, 149, 2, 149, 3).mean((2, 4)).reshape(-1, 12)
        return x, x / 50

    monkeypatch.setattr("asymvq_jax.evaluation.metrics.distribution.inception", network)
    return {}


def test_fid_of_every_row_and_the_paper_s_table(models, inception):
    results = evaluate(*models, iter(_pairs(4)), 4, load_lpips("alexnet"), inception)
    assert results.rows["plain"]["fid"] > results.rows["paste"]["fid"] > 0
    assert "FID" in table(results)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in paper_table(results).splitlines()]
    assert ["x2 (published)", "7.49", "0.134", "2.1"] in rows
    assert [row[0] for row in rows[-2:]] == ["plain (measured)", "ours (measured)"]
    assert rows[-1][1] == f"{results.rows['ours']['fid']:.2f}"
    assert float(rows[-1][3]) == pytest.approx(100_000 * results.rows["ours"]["preservation_error"], abs=0.05)


def test_text_to_image_latents(models, inception, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", 0.18 * rng.normal(size=(4, 6, 7) if i % 2 else (6, 7, 4)).astype(np.float32))
    reference = statistics(rng.normal(128, 20, (20, 12)))
    scores = evaluate_text(*models, str(tmp_path), reference, inception)
    assert list(scores) == ["plain", "ours"]
    assert all(fid > 0 and score >= 1 for fid, score in scores.values())
    assert "x2 without condition (published)" in text_table(scores)
    with pytest.raises(EvaluationError, match=r"--latents .*none does not exist"):
        evaluate_text(*models, str(tmp_path / "none"), reference, inception)
