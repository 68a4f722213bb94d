"""Setting a fill into a picture: against direct solutions, known fields, and whatever lies under the mask."""

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import spsolve

from asymvq_jax.errors import InputError
from asymvq_jax.inference.blend import BLENDS, MIXING, composite, push_pull
from asymvq_jax.inference.edges import cells, distance, ring_means, rings
from asymvq_jax.inference.poisson import poisson

HEIGHT, WIDTH = 45, 58


def _masks(height=HEIGHT, width=WIDTH):
    y, x = np.mgrid[:height, :width]
    one, corner, two, strip = (np.zeros((height, width), bool) for _ in range(4))
    one[20, 31] = True
    corner[0, 0] = True
    two[4:15, 3:20] = two[10:44, 30:58] = True
    strip[:, 20:31] = True
    spiral = (np.hypot(y - height / 2, x - width / 2) * 0.6 - np.arctan2(y - height / 2, x - width / 2)) % 6.3 > 1.5
    return {
        "ellipse": ((y - 22) / 14) ** 2 + ((x - 30) / 19) ** 2 < 1,
        "one pixel": one,
        "one pixel in the corner": corner,
        "two pieces, one at the border": two,
        "from border to border": strip,
        "all but one pixel": ~one,
        "all but the corner": ~corner,
        "full": np.ones((height, width), bool),
        "empty": np.zeros((height, width), bool),
        "noise": np.random.default_rng(0).random((height, width)) < 0.6,
        "spiral": spiral,
    }


MASKS = _masks()


def _pictures(seed=0, count=1, height=HEIGHT, width=WIDTH):
    """Fills and originals, (count, h, w, 3): large shapes of other tones, with noise."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(2, count, height, width, 3)).cumsum(2).cumsum(3)
    return np.clip(128 + waves * 3 + rng.normal(size=waves.shape) * 9, 0, 255).round().astype(np.uint8)


def _direct(fill, original, inside):
    """The sparse system as Pérez et al. write it, for the picture itself, solved by elimination."""
    height, width, channels = fill.shape
    number = np.full((height, width), -1)
    number[inside] = np.arange(inside.sum())
    rows, columns, values = [], [], []
    target = np.zeros((inside.sum(), channels))
    for y, x in zip(*np.nonzero(inside), strict=True):
        p = number[y, x]
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= v < height and 0 <= u < width):
                continue
            rows.append(p), columns.append(p), values.append(1.0)
            if inside[v, u]:
                rows.append(p), columns.append(number[v, u]), values.append(-1.0)
                target[p] += fill[y, x].astype(float) - fill[v, u]
            else:
                target[p] += original[v, u]
    matrix = sparse.csc_matrix((values, (rows, columns)), (len(target), len(target)))
    result = original.astype(float)
    result[inside] = spsolve(matrix, target).reshape(-1, channels)
    return result


@pytest.mark.parametrize("name", [n for n in MASKS if n not in ("full", "empty")])
def test_poisson_is_the_direct_solution(name):
    (fill,), (original,) = _pictures()
    solved = np.asarray(poisson(fill[None], original[None], MASKS[name][None, ..., None]))[0]
    assert np.abs(solved - _direct(fill, original, MASKS[name])).max() < 0.25
    np.testing.assert_array_equal(solved[~MASKS[name]], original[~MASKS[name]])


def test_poisson_of_a_batch_is_that_of_its_pictures():
    fills, originals = _pictures(count=3)
    masks = np.stack([MASKS[n] for n in ("ellipse", "full", "noise")])[..., None]
    together = np.asarray(poisson(fills, originals, masks))
    for fill, original, mask, result in zip(fills, originals, masks, together, strict=True):
        alone = np.asarray(poisson(fill[None], original[None], mask[None]))[0]
        np.testing.assert_allclose(result, alone, atol=0.1)


def test_a_full_mask_gives_the_fill_and_an_empty_one_the_original():
    (fill,), (original,) = _pictures()
    for blend in BLENDS:
        np.testing.assert_array_equal(composite(fill, original, MASKS["full"][..., None], blend), fill)
        np.testing.assert_array_equal(composite(fill, original, MASKS["empty"][..., None], blend), original)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("blend", BLENDS)
def test_what_the_original_holds_under_the_mask_changes_nothing(blend, name):
    (fill, other), (original, _) = _pictures(count=2)
    mask = MASKS[name][..., None]
    result = composite(fill, original, mask, blend)
    np.testing.assert_array_equal(result, composite(fill, np.where(mask, other, original), mask, blend))
    far = distance(~MASKS[name]) > (8 if blend in MIXING else 0)
    np.testing.assert_array_equal(result[far], original[far])


def test_poisson_does_not_read_what_is_not_finite_under_the_mask():
    (fill,), (original,) = _pictures()
    mask = MASKS["ellipse"][None, ..., None]
    unknown = np.where(mask, np.nan, original[None].astype(np.float32))
    np.testing.assert_array_equal(poisson(fill[None], unknown, mask), poisson(fill[None], original[None], mask))


@pytest.mark.parametrize("blend", ["tone", "poisson"])
def test_a_uniform_shift_is_undone(blend):
    picture = (_pictures()[0, 0] // 16 + 120).astype(np.uint8)
    mask = MASKS["ellipse"][..., None]
    shifted = picture - np.uint8(12)
    error = np.abs(composite(shifted, picture, mask, "none").astype(int) - picture)[mask[..., 0]]
    assert set(error.ravel()) == {12}
    # The picture's own differences across the edge, and the prior, leave a little.
    assert np.abs(composite(shifted, picture, mask, blend).astype(int) - picture)[mask[..., 0]].mean() < 2


def test_the_tone_field_slopes_and_an_object_at_the_edge_is_an_outlier():
    y, x = np.mgrid[:96, :96]
    mask = (((y - 48) / 40) ** 2 + ((x - 48) / 40) ** 2 < 1)[..., None]
    picture = np.full((96, 96, 3), 120, np.uint8)
    slope = np.round((x - 48) / 40 * 8 + 10)[..., None].astype(np.uint8)
    fill = picture + slope * np.array([1, 0, 1], np.uint8)
    smooth = composite(fill, picture, mask, "tone")
    assert np.abs(smooth.astype(int) - picture)[mask[..., 0]].mean() < 2
    # A red thing that the mask cuts on one side has an edge there, which is no tone.
    picture = picture.copy()
    picture[30:66, 88:] = (230, 30, 30)
    cut = composite(fill, picture, mask, "tone")
    assert np.abs(cut.astype(int) - smooth)[mask[..., 0]].mean() < 2.5
    assert np.abs(composite(fill, picture, mask, "poisson").astype(int) - smooth)[mask[..., 0]].mean() > 5


def test_pieces_of_a_mask_have_tones_of_their_own():
    picture = np.full((64, 120, 3), 100, np.uint8)
    mask = np.zeros((64, 120, 1), bool)
    mask[10:50, 8:50] = mask[10:50, 70:112] = True
    fill = picture.copy()
    fill[:, :60] += np.uint8(15)
    fill[:, 60:] -= np.uint8(15)
    assert np.abs(composite(fill, picture, mask, "tone").astype(int) - 100).max() <= 1


def test_feathering_is_linear_in_the_kept_pixels_only():
    fill, original = np.full((9, 20, 3), 200, np.uint8), np.full((9, 20, 3), 100, np.uint8)
    mask = np.zeros((9, 20, 1))
    mask[:, :8] = 1
    row = composite(fill, original, mask, "feather", 4)[4, :, 0]
    np.testing.assert_array_equal(row, [200] * 8 + [180, 160, 140, 120] + [100] * 8)
    np.testing.assert_array_equal(composite(fill, original, mask, "feather", 0)[4, :, 0], [200] * 8 + [100] * 12)


def test_octaves_mix_over_widths_of_their_own():
    """A wide tone step becomes a slope under the mask, and fine texture stays up to the edge."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 20, (64, 128, 3))
    fill, original = (np.clip(level + noise, 0, 255).astype(np.uint8) for level in (160, 100))
    mask = np.zeros((64, 128, 1))
    mask[:, 64:] = 1
    blended = composite(fill, original, mask, "multiband").astype(int)
    tone = (blended - noise).mean((0, 2))
    assert 100 < tone[66] < 145 < tone[90] <= 161
    assert np.abs(np.diff(tone))[64:].max() < 5
    assert np.abs(blended[:, 120:] - fill[:, 120:]).max() <= 3


def test_push_and_pull_continues_what_is_known():
    image = np.zeros((40, 64, 3), np.float32) + np.linspace(0, 255, 64, dtype=np.float32)[:, None]
    known = np.ones((40, 64), bool)
    known[10:30, 20:40] = False
    filled = push_pull(np.where(known[..., None], image, np.float32(999)), known)
    np.testing.assert_array_equal(filled[known], image[known])
    assert np.abs(filled - image).max() < 25
    assert not push_pull(image, np.zeros_like(known)).any()


@pytest.mark.parametrize("blend", BLENDS)
def test_sixteen_bits_and_tiny_pictures(blend):
    (fill,), (original,) = _pictures()
    mask = MASKS["ellipse"][..., None]
    wide = composite(fill.astype(np.uint16) * 257, original.astype(np.uint16) * 257, mask, blend)
    assert np.abs(wide / 257 - composite(fill, original, mask, blend)).max() <= 0.51
    for height, width in ((1, 1), (1, 2), (2, 1), (40, 2)):
        (fill,), (original,) = _pictures(height=height, width=width)
        mask = np.zeros((height, width, 1))
        mask[: max(1, height // 2)] = 1
        assert composite(fill, original, mask, blend).shape == original.shape


def test_unknown_blends_are_refused():
    (fill,), (original,) = _pictures()
    with pytest.raises(InputError, match="blend='soft': expected one of none, feather, multiband, tone, poisson"):
        composite(fill, original, MASKS["ellipse"][..., None], "soft")
    with pytest.raises(InputError, match="band=-1: expected zero or more pixels"):
        composite(fill, original, MASKS["ellipse"][..., None], "feather", -1)


def test_rings_and_cells_of_an_edge():
    inside = np.zeros((32, 48), bool)
    inside[8:24, 12:36] = True
    inner, outer = rings(inside, 2)
    assert (inner & ~inside).sum() == 0
    assert inner[8:10, 12:36].all()
    assert not inner[10, 20]
    assert outer[6:8, 12:36].all()
    assert not outer[5].any()
    cell = cells(inside, 16)
    # The nearest edge pixel counts: what lies above the mask belongs to the cell of its upper edge.
    assert cell[0, 20] == cell[8, 20] != cell[31, 20]
    means, pixels = ring_means(np.dstack([np.full(inside.shape, 7.0)]), inner, cell)
    assert pixels.sum() == inner.sum()
    assert set(means[pixels > 0, 0]) == {7.0}
    assert not any(ring.any() for value in (0, 1) for ring in rings(np.full((4, 4), bool(value)), 2))
