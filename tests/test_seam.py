"""The seam's metric on pictures whose step is known, and the sceptic's tables."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.config import ModelConfig
from asymvq_jax.evaluation.metrics.seam import CELL, Contour, join
from asymvq_jax.evaluation.pairs import Pair
from asymvq_jax.evaluation.rows import hard_paste
from asymvq_jax.evaluation.seam import (
    BLURS,
    DRIFT_COLUMNS,
    LATENTS,
    PASSES,
    SEAM_COLUMNS,
    _shifted,
    blurred_paste,
    drift_table,
    measure_drift,
    measure_seam,
    plot,
    seam_table,
)
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import merge, split

CONFIG = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1)


def _flat(colour=(120, 130, 140), height=64, width=80):
    mask = np.zeros((height, width, 1), np.float32)
    mask[16:48, 20:60] = 1
    return np.full((height, width, 3), colour, np.uint8), mask


def test_a_uniform_step_is_measured_as_its_colour_difference():
    original, mask = _flat()
    stepped = np.where(mask > 0, np.uint8((130, 130, 140)), original)
    steps = Contour(original, mask).steps(stepped)
    expected = deltaE_ciede2000(rgb2lab(stepped[20, 30]), rgb2lab(original[0, 0]))
    np.testing.assert_allclose(steps.excess, expected, rtol=1e-6)
    assert steps.smooth.all()
    # The contour crosses two by three cells, some of its edges on their borders.
    assert len(steps.excess) == 6


def test_a_tone_that_is_shifted_everywhere_has_no_seam_and_one_elsewhere_does_not_count():
    original, mask = _flat()
    assert np.abs(Contour(original, mask).steps(original + np.uint8(10)).excess).max() < 1e-6
    elsewhere = original.copy()
    elsewhere[:, 70:] += np.uint8(40)
    assert np.abs(Contour(original, mask).steps(elsewhere).excess).max() < 1e-6


def test_an_edge_of_the_picture_is_not_a_seam():
    original, mask = _flat()
    original = np.where(mask > 0, np.uint8(200), original)
    assert Contour(original, mask).steps(original).summary()["seam"] == 0
    # Blurring it away is the opposite of a seam.
    flat = np.full_like(original, 120)
    assert Contour(original, mask).steps(flat).summary()["seam"] < -5


def test_smooth_and_textured_contours_stand_apart():
    rng = np.random.default_rng(0)
    original, mask = _flat()
    original[:, 40:] = rng.integers(0, 255, (64, 40, 3))
    steps = Contour(original, mask).steps(np.where(mask > 0, original // 2, original))
    assert 0 < steps.smooth.sum() < len(steps.smooth)
    summary = steps.summary()
    together = join([steps, steps])
    assert together.summary()["seam"] == pytest.approx(summary["seam"])
    share = steps.smooth.mean()
    mixed = share * summary["seam_smooth"] + (1 - share) * summary["seam_textured"]
    assert mixed == pytest.approx(summary["seam"])


@pytest.mark.parametrize("value", [0, 1])
def test_no_contour_no_pieces(value):
    original, mask = _flat()
    steps = Contour(original, np.full_like(mask, value)).steps(original)
    assert len(steps.excess) == 0
    assert np.isnan(steps.summary()["seam"])


def test_thin_rings_of_a_corner_are_left_out():
    original, mask = _flat()
    mask[:] = 0
    mask[: CELL + 1, : CELL + 1] = 1
    # The cell beyond the corner holds one masked pixel.
    assert len(Contour(original, mask).steps(original).excess) <= 3


def test_a_blurred_paste_lies_between():
    original, mask = _flat()
    other = original + np.uint8(60)
    blurred = blurred_paste(other, original, mask, 2)
    assert (blurred[0, 0] == original[0, 0]).all()
    assert (blurred[32, 40] == other[32, 40]).all()
    assert original[32, 20, 0] < blurred[32, 20, 0] < other[32, 20, 0]
    hard, soft = (
        Contour(original, mask).steps(x).summary()["seam"] for x in (hard_paste(other, original, mask), blurred)
    )
    assert soft < hard


def test_the_shift_is_under_the_mask_only():
    mask = np.zeros((9, 8, 1), np.float32)
    mask[3, 2] = 1
    latent = np.random.default_rng(0).normal(size=(1, 5, 4, 4)).astype(np.float32)
    changed = (_shifted(latent, mask, 2) != latent).any(-1)[0]
    assert changed[1, 1]
    assert changed.sum() == 1


@pytest.fixture(scope="module")
def models():
    model = Autoencoder(CONFIG, rngs=nnx.Rngs(0))
    _, params = split(model)
    plain = dataclasses.replace(CONFIG, condition=False)
    graphdef, shapes = split(nnx.eval_shape(lambda: Autoencoder(plain, rngs=nnx.Rngs(0))))
    return model, merge(graphdef, {name: params[name] for name in shapes})


def _pair():
    rng = np.random.default_rng(0)
    image = images.to_uint8(np.clip(rng.normal(size=(41, 48, 3)).cumsum(1).cumsum(0) / 60, -1, 1))
    mask = np.zeros((41, 48, 1), np.float32)
    mask[8:30, 10:30] = 1
    return Pair("a", image, mask)


def test_tables_and_plot(models, tmp_path):
    seam = measure_seam(*models, [_pair()], 1)
    assert list(seam) == list(LATENTS)
    for rows in seam.values():
        assert list(rows) == [
            "plain",
            "paste",
            *(f"paste, blurred {r} px" for r in BLURS),
            "Poisson",
            "ours",
            "ours + paste",
        ]
        assert rows["paste"]["psnr_preserved"] == np.inf
        assert rows["plain"]["psnr_preserved"] < np.inf
        assert all(set(values) == set(SEAM_COLUMNS) for values in rows.values())
    own, shifted = (seam[latent] for latent in LATENTS)
    assert own["plain"]["boundary_error"] != shifted["plain"]["boundary_error"]
    assert "| paste, blurred 4 px |" in seam_table(own)
    plot(str(tmp_path / "seam.png"), seam)
    assert images.read(tmp_path / "seam.png").std() > 5


def test_drift_is_measured_against_the_first_original(models):
    rows = measure_drift(*models, [_pair()], 1)
    assert {len(passes) for passes in rows.values()} == {PASSES}
    assert all(set(values) == set(DRIFT_COLUMNS) for passes in rows.values() for values in passes)
    assert all(values["psnr_preserved"] == np.inf for values in rows["paste"])
    assert rows["paste"][0]["lightness"] == 0
    assert rows["paste"][0]["sharpness"] == 1
    assert rows["plain"][0] != rows["plain"][-1]
    assert "ours, pass 10" in drift_table(rows)
