"""LPIPS with its real weights against the published architecture in torch; the GAN's terms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import TorchLPIPS, nchw, relative_error
from safetensors.numpy import save_file

from asymvq_jax.errors import UserError
from asymvq_jax.losses.adversarial import adaptive_weight, discriminator_hinge, generator_term
from asymvq_jax.losses.lpips import _TORCHVISION, load_lpips
from asymvq_jax.losses.reconstruction import reconstruction_loss
from asymvq_jax.models.parameters import split


def _pictures(height=45, width=67):
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    return a, np.clip(a + rng.normal(size=a.shape, scale=0.2), -1, 1).astype(np.float32)


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_lpips_equals_torch(net):
    ours = load_lpips(net)
    theirs = TorchLPIPS(split(ours)[1], net)
    a, b = _pictures()
    np.testing.assert_allclose(ours(a, b), theirs(nchw(a), nchw(b)).flatten(), rtol=1e-4)

    x = nchw(a).requires_grad_()
    theirs(x, nchw(b)).sum().backward()
    gradient = jax.grad(lambda image: jnp.sum(ours(image, b)))(a)
    assert relative_error(gradient, x.grad.permute(0, 2, 3, 1)) <= 1e-4


def test_lpips_gradient_is_finite_for_equal_and_flat_pictures():
    lpips = load_lpips("vgg16")
    flat = jnp.full((1, 32, 32, 3), -1.0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(lpips(x, flat)))(flat)).all()


def test_reconstruction_loss_has_the_reference_sums():
    lpips = load_lpips("vgg16")
    a, b = _pictures(32, 32)
    theirs = TorchLPIPS(split(lpips)[1])(nchw(a), nchw(b))
    expected = ((nchw(a) - nchw(b)).abs() + 0.7 * theirs).sum() / 2
    loss, parts = reconstruction_loss(jnp.asarray(a), jnp.asarray(b), lpips, 0.7)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(parts["l1"], np.abs(a - b).mean(), rtol=1e-5)


def test_squared_error_is_added_with_its_weight():
    a, b = _pictures(8, 8)
    loss, _ = reconstruction_loss(jnp.asarray(a), jnp.asarray(b), None, 1.0, "mean", squared_weight=5.0)
    np.testing.assert_allclose(loss, np.abs(a - b).mean() + 5 * np.square(a - b).mean(), rtol=1e-5)


def test_adversarial_terms():
    real, fake = np.array([[2.0, -0.5]], np.float32), np.array([[-3.0, 0.25]], np.float32)
    np.testing.assert_allclose(discriminator_hinge(real, fake), 0.5 * (1.5 / 2) + 0.5 * (1.25 / 2))
    np.testing.assert_allclose(generator_term(fake), 1.375)
    np.testing.assert_allclose(adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])), 5 / 2.0001, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(jnp.array([3.0]), jnp.array([0.0])), 1e4)


def test_user_weights_replace_the_embedded_ones(tmp_path):
    params = {k: np.asarray(v) for k, v in split(load_lpips("alexnet"))[1].items()}
    theirs = {
        f"features.{p}.{t}": np.ascontiguousarray(2 * params[f"convs.{i}.{o}"].transpose(*axes))
        for i, p in enumerate(_TORCHVISION["alexnet"])
        for o, t, axes in (("kernel", "weight", (3, 2, 0, 1)), ("bias", "bias", (0,)))
    }
    save_file(theirs, tmp_path / "alexnet.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in theirs.items()}, tmp_path / "alexnet.pth")
    for name in ("alexnet.safetensors", "alexnet.pth"):
        loaded = split(load_lpips("alexnet", str(tmp_path / name)))[1]
        np.testing.assert_array_equal(loaded["convs.2.kernel"], 2 * params["convs.2.kernel"])
        np.testing.assert_array_equal(loaded["heads.3"], params["heads.3"])
    with pytest.raises(UserError, match=r"features\.0\.weight does not have the shape that torchvision's"):
        load_lpips("vgg16", str(tmp_path / "alexnet.pth"))
    with pytest.raises(UserError, match="no weights file at"):
        load_lpips("vgg16", str(tmp_path / "none.pth"))
