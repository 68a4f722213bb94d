"""Several fills of one picture: the same pictures as one by one, with less work."""

import jax
import numpy as np
import pytest
from flax import nnx
from oracles import TINY

from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.errors import InputError
from asymvq_jax.inference import Fills, decode, fills, inpaint
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.parameters import merge, split


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return Autoencoder(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 24), bool)
    mask[4:13, 6:15] = True
    return rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), mask


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32)


def test_one_picture_serves_many_latents(model, picture, latents):
    """Decoded beside it they are what each would be alone; and a picture without its mask does not pass for one."""
    image, mask = picture[0][None] / np.float32(127.5) - 1, picture[1][None, ..., None].astype(np.float32)
    together = decode(model, latents, image, mask)
    for i, latent in enumerate(latents):
        np.testing.assert_allclose(together[i : i + 1], decode(model, latent[None], image, mask), atol=1e-5)
    np.testing.assert_allclose(Fills(model, *picture).decode(latents), together, atol=1e-5)
    with pytest.raises(ValueError, match="mask has shape"):
        model.decode(latents[:2], np.zeros((2, 24, 24, 3), np.float32), np.zeros((1, 24, 24, 1), np.float32))


@pytest.mark.parametrize("keep", ["model", "exact"])
def test_fills_are_those_of_inpaint(model, picture, latents, keep):
    held = Fills(model, *picture)
    for latent in (None, latents[0], latents[1]):
        found, expected = held.inpaint(latent, keep=keep), inpaint(model, *picture, latent, keep=keep)
        # A last bit of float32 may round to the next level.
        assert np.abs(found.image.astype(int) - expected.image.astype(int)).max() <= 1


def test_what_does_not_depend_on_the_latent_is_computed_once(model, picture, latents, monkeypatch):
    calls = []
    for name in ("encode", "_condition"):
        function = getattr(fills, name)
        monkeypatch.setattr(
            fills, name, lambda *a, name=name, function=function, **o: (calls.append(name), function(*a, **o))[1]
        )
    held = Fills(model, *picture)
    for latent in (None, latents[0], None, latents[1]):
        held.inpaint(latent, layout="channels-last", scaled=False) if latent is not None else held.inpaint()
    assert sorted(calls) == ["_condition", "encode"]


def test_the_work_of_many_latents_on_one_picture(model):
    """The condition branch's FLOPs count once instead of for each of them."""
    graphdef, params = split(model)

    def flops(latents, pictures):
        shapes = [(latents, 4, 4, 4), (pictures, 32, 32, 3), (pictures, 32, 32, 1)]
        run = lambda params, *x: merge(graphdef, params).decode(*x)  # noqa: E731
        return matmul_flops(jax.make_jaxpr(run)(params, *(jax.ShapeDtypeStruct(s, np.float32) for s in shapes)).jaxpr)

    branch = flops(1, 1) - (flops(4, 1) - flops(1, 1)) / 3
    assert 0 < branch < flops(1, 1)
    assert flops(4, 4) - flops(4, 1) == pytest.approx(3 * branch)


def test_bad_pictures_are_refused(model, picture):
    with pytest.raises(InputError, match="must have the same size"):
        Fills(model, picture[0], picture[1][1:])
