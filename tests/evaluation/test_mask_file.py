"""The page's mask file: how it is read, what is said of it, and how it joins what is painted."""

import numpy as np
import pytest
from PIL import Image

from asymvq_jax.errors import InputError, MaskError
from asymvq_jax.evaluation.mask_file import FOUND, note, read_mask_file
from asymvq_jax.evaluation.page import read_inputs

SIZE = (20, 30)


def _save(path, array) -> str:
    Image.fromarray(array).save(path)
    return str(path)


@pytest.fixture
def grey(tmp_path):
    array = np.zeros(SIZE, np.uint8)
    array[5:10, 6:12] = 255
    return _save(tmp_path / "grey.png", array)


@pytest.fixture
def ambiguous(tmp_path):
    """Black everywhere, transparent but for a box."""
    array = np.zeros((*SIZE, 4), np.uint8)
    array[5:10, 6:12, 3] = 255
    return _save(tmp_path / "black.png", array)


def test_the_file_is_read_as_the_command_reads_it(grey, ambiguous):
    box = np.zeros((*SIZE, 1), np.uint8)
    box[5:10, 6:12] = 1
    np.testing.assert_array_equal(read_mask_file(grey, FOUND, False, SIZE).values, box)
    np.testing.assert_array_equal(read_mask_file(grey, FOUND, True, SIZE).values, 1 - box)
    with pytest.raises(MaskError, match=r"mask black\.png is black with a varying alpha.* --mask-channel alpha"):
        read_mask_file(ambiguous, FOUND, False, SIZE)
    np.testing.assert_array_equal(read_mask_file(ambiguous, "alpha", False, SIZE).values, box)
    with pytest.raises(MaskError, match=r"mask grey\.png has no alpha channel"):
        read_mask_file(grey, "alpha", False, SIZE)


def test_another_size_is_refused(grey):
    with pytest.raises(InputError, match=r"^mask grey\.png has 30 x 20 px and the picture 31 x 20 px: expected equal"):
        read_mask_file(grey, FOUND, False, (20, 31))
    with pytest.raises(InputError, match="the picture 20 x 30 px: expected equal sizes; one of them is turned"):
        read_mask_file(grey, FOUND, False, SIZE[::-1])


def test_what_is_said_of_it(grey, ambiguous, tmp_path):
    assert note(None, FOUND, False, SIZE) == ""
    assert "waits for a picture" in note(grey, FOUND, False, None)
    assert note(grey, FOUND, False, SIZE) == "grey.png: mask from brightness, 5% generated"
    assert note(ambiguous, FOUND, False, SIZE).startswith("**Refused:** mask black.png is black with")
    assert "expected equal sizes" in note(grey, FOUND, False, (1, 1))
    black = _save(tmp_path / "b.png", np.zeros(SIZE, np.uint8))
    assert "b.png is black: nothing is generated" in note(black, FOUND, False, SIZE)
    (tmp_path / "text.png").write_text("no picture")
    assert note(str(tmp_path / "text.png"), FOUND, False, SIZE).startswith("**Refused:** text.png is not a")


def test_it_is_added_to_what_is_painted(grey, ambiguous, tmp_path):
    picture = np.full((*SIZE, 3), 90, np.uint8)
    layer = np.zeros((*SIZE, 4), np.uint8)
    layer[15:, 20:] = 255
    painting = {
        "background": _save(tmp_path / "picture.png", picture),
        "layers": [_save(tmp_path / "layer.png", layer)],
    }
    box = np.zeros((*SIZE, 1), np.float32)
    box[5:10, 6:12] = 1
    both = np.maximum(box, layer[..., 3:] / 255)
    image, mask = read_inputs(painting, SIZE, grey, FOUND, False)
    np.testing.assert_array_equal(image, picture)
    np.testing.assert_array_equal(mask, both)
    np.testing.assert_array_equal(read_inputs(painting | {"layers": []}, SIZE, grey, FOUND, False)[1], box)
    np.testing.assert_array_equal(read_inputs(painting, SIZE, None, FOUND, False)[1], layer[..., 3:] / 255)
    with pytest.raises(MaskError, match="varying alpha"):
        read_inputs(painting, SIZE, ambiguous, FOUND, False)
    with pytest.raises(InputError, match="There is no picture yet"):
        read_inputs(painting, None, grey, FOUND, False)
    with pytest.raises(InputError, match="or choose a mask file"):
        read_inputs(painting | {"layers": []}, SIZE, None, FOUND, False)


def test_of_a_picture_that_was_scaled_down_the_mask_has_its_own_size(tmp_path):
    painting = {"background": _save(tmp_path / "shown.png", np.zeros((10, 20, 3), np.uint8)), "layers": []}
    large = np.zeros((30, 60), np.uint8)
    large[15, 31] = 255
    image, mask = read_inputs(painting, (30, 60), _save(tmp_path / "large.png", large), FOUND, False)
    assert image.shape[:2] == mask.shape[:2] == (10, 20)
    # A line one pixel wide is not lost.
    assert np.argwhere(mask[..., 0]).tolist() == [[5, 10]]
