"""The benchmark of seams: metrics on pictures whose step, tone and grain are known, protocols, rows and reports."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from skimage.color import deltaE_ciede2000, rgb2lab

from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import EvaluationError
from asymvq_jax.evaluation import drift, seam_report
from asymvq_jax.evaluation.metrics.fill import fill_tone, grain
from asymvq_jax.evaluation.metrics.seam import CELL, Contour, join
from asymvq_jax.evaluation.pairs import Pair
from asymvq_jax.evaluation.pictures import Picture, read_pictures
from asymvq_jax.evaluation.protocols import MASKS, PROTOCOLS, cases, count_cases, draw_mask, inset, shift
from asymvq_jax.evaluation.rows import compose, decode_ours, hard_paste
from asymvq_jax.evaluation.seam import (
    COLUMNS,
    FEATHERS,
    Decoded,
    Measured,
    Models,
    check_row,
    compose_rows,
    judge,
    match_colours,
    measure_seam,
)
from asymvq_jax.files import images
from asymvq_jax.inference.blend import BLENDS, composite
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import merge, seeded, split

CONFIG = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1)


def _flat(colour=(120, 130, 140), height=64, width=80):
    mask = np.zeros((height, width, 1), np.float32)
    mask[16:48, 20:60] = 1
    return np.full((height, width, 3), colour, np.uint8), mask


def _photo(seed=0, height=64, width=80):
    """Large shapes with texture."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(height, width, 3)).cumsum(0).cumsum(1)
    return np.clip(128 + 2 * waves + 8 * rng.normal(size=waves.shape), 0, 255).astype(np.uint8)


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
    assert Contour(original, mask).steps(original).summary()["step"] == 0
    # Blurring it away is the opposite of a seam.
    flat = np.full_like(original, 120)
    assert Contour(original, mask).steps(flat).summary()["step_signed"] < -5


def test_an_edge_that_is_blurred_away_does_not_make_up_for_a_step():
    original, mask = _flat(height=64, width=160)
    mask[:] = 0
    mask[:, 40:120] = 1
    truth = original.copy()
    truth[:, 120:] = 180
    # On the left a step that the truth has not, on the right none where it has one.
    image = np.full_like(truth, 180)
    image[:, :40] = original[:, :40]
    summary = Contour(truth, mask).steps(image).summary()
    assert summary["step"] > 10
    assert abs(summary["step_signed"]) < summary["step"] / 2
    assert summary["step_p95"] >= summary["step"]


def test_smooth_and_textured_contours_stand_apart():
    rng = np.random.default_rng(0)
    original, mask = _flat()
    original[:, 40:] = rng.integers(0, 255, (64, 40, 3))
    steps = Contour(original, mask).steps(np.where(mask > 0, original // 2, original))
    assert 0 < steps.smooth.sum() < len(steps.smooth)
    summary = steps.summary()
    together = join([steps, steps])
    assert together.summary()["step_signed"] == pytest.approx(summary["step_signed"])
    share = steps.smooth.mean()
    mixed = share * summary["step_smooth"] + (1 - share) * summary["step_textured"]
    assert mixed == pytest.approx(summary["step"])


@pytest.mark.parametrize("value", [0, 1])
def test_no_contour_no_pieces(value):
    original, mask = _flat()
    steps = Contour(original, np.full_like(mask, value)).steps(original)
    assert len(steps.excess) == 0
    assert np.isnan(steps.summary()["step"])


def test_thin_rings_of_a_corner_are_left_out():
    original, mask = _flat()
    mask[:] = 0
    mask[: CELL + 1, : CELL + 1] = 1
    # The cell beyond the corner holds one masked pixel.
    assert len(Contour(original, mask).steps(original).excess) <= 3


def test_the_tone_of_a_fill_is_the_colour_difference_of_its_blur():
    original, mask = _flat()
    other = np.where(mask > 0, np.uint8((130, 130, 140)), original)
    expected = deltaE_ciede2000(rgb2lab(other[20, 30]), rgb2lab(original[0, 0]))
    assert fill_tone(other, original, mask) == pytest.approx(expected, rel=1e-3)
    # Noise has no tone, and what is outside does not count.
    noise = np.random.default_rng(0).integers(-9, 10, original.shape)
    assert fill_tone((original + noise).astype(np.uint8), original, mask) < 0.5
    assert fill_tone(np.where(mask > 0, original, np.uint8(0)), original, mask) == 0
    assert np.isnan(fill_tone(original, original, np.zeros_like(mask)))


def test_grain_is_the_octaves_of_fine_variance_and_a_step_is_none():
    original, mask = _flat()
    noise = np.random.default_rng(0).normal(size=(64, 80, 1)) * 16
    truth = (original + noise).astype(np.uint8)
    assert grain(truth, truth, mask) == 0
    half = np.where(mask > 0, original + noise / 2, truth).astype(np.uint8)
    assert grain(half, truth, mask) == pytest.approx(-2, abs=0.15)
    assert grain(np.where(mask > 0, truth + np.uint8(20), truth), truth, mask) == pytest.approx(0, abs=0.01)
    assert np.isnan(grain(truth, truth, np.ones_like(mask)))


def test_matched_colours_have_the_ring_s_statistics():
    original, mask = _flat()
    noise = np.random.default_rng(0).normal(size=(64, 80, 1))
    picture = (original + 16 * noise).astype(np.uint8)
    fill = (original * 0.8 + (30, 0, 10) + 10 * noise).astype(np.uint8)
    matched = match_colours(fill, picture, mask)
    assert fill_tone(fill, picture, mask) > 10
    assert fill_tone(matched, picture, mask) < 1
    left, right = (grain(hard_paste(each, picture, mask), picture, mask) for each in (matched, fill))
    assert abs(left) < 0.2 < 1 < abs(right)
    np.testing.assert_array_equal(match_colours(fill, picture, np.ones_like(mask)), fill)


@pytest.fixture(scope="module")
def models():
    model = Autoencoder(CONFIG, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    plain = dataclasses.replace(CONFIG, condition=False)
    plain_graph, shapes = split(nnx.eval_shape(lambda: Autoencoder(plain, rngs=seeded(0))))
    other = split(Autoencoder(CONFIG, rngs=nnx.Rngs(1)))[1]
    harmonised = {name: other[name] if name.startswith("decoder.") else params[name] for name in params}
    return Models(model, merge(plain_graph, {name: params[name] for name in shapes}), merge(graphdef, harmonised))


def _pictures(count=2, height=41, width=48):
    return [Picture(f"p{i}", _photo(i, height, width)) for i in range(count)]


def test_no_row_reads_the_original_under_the_mask(models):
    picture, mask = _photo(0, 40, 48), np.zeros((40, 48, 1), np.float32)
    mask[9:30, 12:48] = 1
    latent = models.encode(picture)
    table = models.ours, models.plain
    results = []
    for original in (picture, np.where(mask > 0, _photo(7, 40, 48), picture)):
        decoded = {
            name: Decoded(*(decode(original, mask, latent, exact) for exact in (False, True)))
            for name, decode in models.decoders().items()
        }
        results.append(compose_rows(decoded, original, mask))
        # Nor do the table's rows and what the library gives.
        results[-1] |= {f"composite, {b}": composite(decoded["ours"].fill, original, mask, b) for b in BLENDS}
        results[-1] |= {f"table, {k}": v for k, v in compose(*table, Pair("a", original, mask), latent).items()}
        results[-1]["page"] = hard_paste(decoded["plain"].whole, original, mask)
    assert len(results[0]) == 9 + 4 + 4 + len(BLENDS) + 5 + 1
    for row, image in results[0].items():
        np.testing.assert_array_equal(image, results[1][row], err_msg=row)


def test_no_metric_reads_what_the_editor_has_under_the_mask(models):
    made = [case for case in cases(_pictures(), 0) if case.kind == "painted"][:5]
    changed = [
        dataclasses.replace(case, original=np.where(case.mask > 0.5, _photo(9, 41, 48), case.original)) for case in made
    ]
    assert any((a.original != b.original).any() for a, b in zip(made, changed, strict=True))
    before, after = (measure_seam(models, each, len(each)) for each in (made, changed))
    assert len(before) == len(after) == 5 * 17
    for a, b in zip(before, after, strict=True):
        np.testing.assert_equal(a.values, b.values)


def test_rows_and_metrics_have_their_names(models):
    picture = _pictures()[0]
    case = next(cases(_pictures(), 0))
    measured = measure_seam(models, [case], 1)
    assert [m.row for m in measured] == [
        "plain",
        "paste",
        *(f"paste, feathered {w} px" for w in FEATHERS),
        "multiband",
        "colour-matched paste",
        "tone",
        "Poisson",
        *(f"{name}{way}" for name in ("ours", "harmonised") for way in ("", " + paste", " + tone", " + Poisson")),
    ]
    assert all(set(m.values) == set(COLUMNS) - {"lpips"} for m in measured)
    by_row = {m.row: m.values for m in measured}
    exact = [row for row, values in by_row.items() if values["psnr_preserved"] == np.inf]
    assert "Poisson" in exact
    assert not {"plain", "ours", "multiband"} & set(exact)
    assert by_row["paste"]["psnr_masked"] == by_row["plain"]["psnr_masked"]
    assert all(values["grain"] == abs(values["grain_signed"]) for values in by_row.values())
    assert any(values["grain_signed"] < 0 for values in by_row.values())
    # The truth itself is without fault.
    ((_, values),) = judge({"truth": picture.image}, picture.image, case.mask, None)
    assert {values[name] for name in ("step", "tone", "gradient", "grain")} == {0}


def test_models_that_do_not_belong_together_are_refused(models):
    other = Autoencoder(CONFIG, rngs=nnx.Rngs(5))
    with pytest.raises(EvaluationError, match=r"the model of --harmonised has another encoder \(\d+ parameters differ"):
        measure_seam(Models(models.ours, models.plain, other), [], 0)
    assert list(Models(models.ours).decoders()) == ["plain (ours, no condition)", "ours"]
    check_row(models, "harmonised + Poisson")
    with pytest.raises(EvaluationError, match="--against 'harmonised': expected one of plain, paste, "):
        check_row(Models(models.ours, models.plain), "harmonised")


def test_protocols_put_under_the_mask_what_they_say():
    pictures = _pictures(3, 64, 80)
    made = list(cases(pictures, 3))
    assert len(made) == count_cases(pictures) == 3 * len(MASKS) * len(PROTOCOLS)
    assert [c.protocol for c in made[: len(PROTOCOLS)]] == list(PROTOCOLS)
    for case in made:
        outside = case.mask[..., 0] < 0.5
        image = next(p.image for p in pictures if p.name == case.picture)
        np.testing.assert_array_equal(case.original, image)
        for x in (case.truth, case.encoded):
            np.testing.assert_array_equal(x[outside], image[outside])
        assert (case.truth != case.original).any() == case.protocol.startswith("inserted")
        assert (case.encoded != case.truth).any() == case.protocol.endswith("shifted")
    flush, inside = (next(c for c in made if c.protocol == p) for p in ("inserted flush", "inserted inside"))
    edge = inset(flush.mask[..., 0] > 0.5) != (flush.mask[..., 0] > 0.5)
    np.testing.assert_array_equal(inside.truth[edge], inside.original[edge])
    assert (flush.truth[edge] != flush.original[edge]).any()
    again = list(cases(pictures, 3))
    assert all(np.array_equal(a.encoded, b.encoded) for a, b in zip(made, again, strict=True))
    assert not np.array_equal(made[0].mask, next(cases(pictures, 4)).mask)


def test_a_mask_that_came_with_the_picture_is_the_only_one():
    mask = np.zeros((41, 48, 1), np.float32)
    mask[5:20, 5:20] = 1
    picture = dataclasses.replace(_pictures(1)[0], mask=mask)
    made = list(cases([picture], 0))
    assert len(made) == count_cases([picture]) == len(PROTOCOLS)
    assert {c.kind for c in made} == {"given"}
    np.testing.assert_array_equal(made[0].mask, mask)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_fit_the_picture(kind):
    for seed in range(20):
        mask = draw_mask(kind, np.random.default_rng(seed), (48, 72))
        assert mask.shape == (48, 72, 1)
        assert set(np.unique(mask)) <= {0, 1}
        assert 0 < mask.mean() < 1


def test_a_shift_is_as_large_as_it_is_drawn():
    picture, region = _photo(), _flat()[1][..., 0] > 0
    sizes = []
    for seed in range(24):
        moved = shift(picture, region, np.random.default_rng(seed))
        wanted = np.random.default_rng(seed).uniform(2, 12)
        difference = deltaE_ciede2000(rgb2lab(moved[region] / 255), rgb2lab(picture[region] / 255)).mean()
        sizes.append(difference / wanted)
    # Half of them have another texture too, which adds to it.
    assert np.mean(np.isclose(sizes, 1, atol=0.05)) >= 0.3
    assert 0.9 < np.median(sizes) < 1.6


def _measured(values):
    """By row and picture, the step; the tone is ten times as much."""
    return [
        Measured(f"p{i}", "painted", "own", row, {"psnr_preserved": kept, "step": v, "tone": 10 * v})
        for row, (kept, steps) in values.items()
        for i, v in enumerate(steps)
    ]


def test_intervals_are_paired_over_pictures():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 10, 40)
    measured = _measured(
        {
            "paste": (np.inf, base),
            "better": (np.inf, base - 1 + 0.1 * rng.normal(size=40)),
            "same": (30.0, base + rng.normal(size=40) - 0.02),
        }
    )
    summary = seam_report.summarise(measured, "paste")
    assert list(summary) == ["own", seam_report.TOGETHER]
    rows = summary["own"]
    assert rows["paste"]["step"]["mean"] == pytest.approx(base.mean())
    assert rows["paste"]["step"]["p95"] == pytest.approx(np.percentile(base, 95))
    assert rows["paste"]["step"]["difference"] == 0
    # The pictures differ by far more than the rows, which pairing takes away.
    better = rows["better"]["step"]
    assert better["low"] < better["difference"] < better["high"] < -0.9
    assert better["difference"] == pytest.approx(-1, abs=0.05)
    assert rows["same"]["step"]["low"] < 0 < rows["same"]["step"]["high"]
    assert seam_report.exact_rows(summary) == ["paste", "better"]


def test_cases_of_one_picture_are_drawn_together():
    """Ten equal cases of each of two pictures are two observations, not twenty."""
    measured = []
    for picture, value in (("a", 1.0), ("b", 3.0)):
        for kind in range(10):
            for row, step in (("paste", 0.0), ("ours", value)):
                measured.append(Measured(picture, str(kind), "own", row, {"psnr_preserved": 30.0, "step": step}))
    interval = seam_report.summarise(measured, "paste")["own"]["ours"]["step"]
    assert (interval["low"], interval["difference"], interval["high"]) == (1.0, 2.0, 3.0)


def test_tables_show_what_was_measured_times_its_factor(tmp_path):
    values = {"psnr_preserved": np.inf, "step": 1.25, "gradient": 0.0625, "tone": 3.5}
    measured = [Measured("a", "thin", protocol, "paste", values) for protocol in PROTOCOLS]
    summary = seam_report.summarise(measured, "paste")
    table = seam_report.seam_table(summary["own"]).splitlines()
    assert [c.strip() for c in table[0].split("|")[1:-1]] == [
        "", "PSNR kept, dB", "step, abs. (p95)", "gradient error x 1e-3", "fill tone (p95)"
    ]  # fmt: skip
    assert [c.strip() for c in table[2].split("|")[1:-1]] == ["paste", "inf", "1.25 (1.25)", "62.5", "3.5 (3.50)"]
    assert "| paste |" in seam_report.goal_table(summary, "paste")
    seam_report.plot(str(tmp_path / "seam.png"), summary)
    assert images.read(tmp_path / "seam.png").std() > 5


def test_lighter_is_positive_and_blurred_is_less_sharp():
    picture, (_, mask) = _photo() // 2 + np.uint8(40), _flat()
    assert drift.drifted(picture, picture, mask) == {"psnr_preserved": np.inf, "lightness": 0, "sharpness": 1}
    lighter = drift.drifted(np.where(mask > 0, picture, picture + np.uint8(20)), picture, mask)
    assert 5 < lighter["lightness"] < 12
    flatter = drift.drifted((picture * 0.5 + 50).astype(np.uint8), picture, mask)
    assert 0.35 < flatter["sharpness"] < 0.65
    # What is under the mask plays no part.
    assert drift.drifted(np.where(mask > 0, np.uint8(0), picture), picture, mask)["sharpness"] == 1


def test_drift_is_measured_against_the_first_original(models):
    rows = drift.measure_drift(models, _pictures(1), 0)
    assert list(rows) == ["plain", "paste", "ours", "ours + paste", "harmonised", "harmonised + paste"]
    assert {len(passes) for passes in rows.values()} == {drift.PASSES}
    assert all(set(values) == set(drift.DRIFT_COLUMNS) for passes in rows.values() for values in passes)
    assert all(values["psnr_preserved"] == np.inf for values in rows["paste"])
    assert rows["paste"][0]["lightness"] == 0
    assert rows["paste"][0]["sharpness"] == 1
    assert rows["plain"][0] != rows["plain"][-1]
    assert "ours, pass 10" in drift.drift_table(rows)


def test_many_edits_keep_what_is_pasted(models, monkeypatch):
    monkeypatch.setattr(drift, "EDITS", 6)
    monkeypatch.setattr(drift, "SHOWN_EDITS", (1, 6))
    rows = drift.measure_edits(models, _pictures(2), 1, 0)
    assert {len(steps) for steps in rows.values()} == {drift.EDITS}
    # The first edit has no fill before it.
    assert np.isnan(rows["plain"][0]["psnr_fills"])
    for row in ("paste", "ours + paste", "harmonised + paste"):
        assert {step["psnr_preserved"] for step in rows[row] if not np.isnan(step["psnr_preserved"])} == {np.inf}
        assert {step["psnr_fills"] for step in rows[row][1:] if not np.isnan(step["psnr_fills"])} == {np.inf}
    assert rows["plain"][5]["psnr_fills"] < np.inf
    assert rows["plain"][0]["psnr_preserved"] < np.inf
    assert "| ours + paste, edit 6 " in drift.edits_table(rows)


def test_folders_of_whole_pictures(tmp_path):
    for name in ("b", "a", "in/c"):
        (tmp_path / "in").mkdir(exist_ok=True)
        images.write(tmp_path / f"{name}.png", _photo(0, 40, 60))
    pictures = read_pictures(str(tmp_path), 2, 32)
    assert [p.name for p in pictures] == ["a.png", "b.png"]
    assert pictures[0].image.shape == (32, 32, 3)
    assert pictures[0].mask is None
    assert read_pictures(str(tmp_path), 9, 0)[2].image.shape == (40, 60, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no pictures"):
        read_pictures(str(tmp_path / "empty"), 2, 32)


def test_the_layout_of_misato(tmp_path):
    for name in ("image", "mask"):
        (tmp_path / name).mkdir()
    for i in range(2):
        images.write(tmp_path / f"image/{i:04}.png", _photo(i, 40, 40))
        images.write(tmp_path / f"mask/{i:04}.png", np.full((40, 40, 3), 255, np.uint8) * (np.arange(40) < 10)[:, None])
    pictures = read_pictures(str(tmp_path), 5, 20)
    assert [p.name for p in pictures] == ["0000.png", "0001.png"]
    assert pictures[0].mask.shape == (20, 20, 1)
    np.testing.assert_array_equal(pictures[0].mask[0, :, 0], [1] * 5 + [0] * 15)
    (tmp_path / "mask/0001.png").unlink()
    with pytest.raises(EvaluationError, match=r"0001\.png has no mask; expected 0001\.png in"):
        read_pictures(str(tmp_path), 5, 20)
    images.write(tmp_path / "mask/0001.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(EvaluationError, match=r"0001\.png is 40 x 40 px and its mask 9 x 8 px"):
        read_pictures(str(tmp_path), 5, 20)


def test_the_decoder_does_not_see_the_original_under_the_mask(models):
    picture, mask = _photo(0, 40, 48), np.zeros((40, 48, 1), np.float32)
    mask[9:30, 12:48] = 1
    latent = models.encode(picture)
    other = np.where(mask > 0, np.uint8(0), picture)
    np.testing.assert_array_equal(
        decode_ours(models.ours, picture, mask, latent), decode_ours(models.ours, other, mask, latent)
    )
