"""The shapes in signatures, checked while the public functions run."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import TypeCheckError, jaxtyped

from asymvq_jax.config import LossConfig, ModelConfig
from asymvq_jax.inference import inpainting, whole
from asymvq_jax.losses import adversarial, lpips, reconstruction
from asymvq_jax.models import autoencoder, codebook, decoder, discriminator, encoder, posterior

MODULES = (
    autoencoder,
    codebook,
    decoder,
    discriminator,
    encoder,
    posterior,
    adversarial,
    lpips,
    reconstruction,
    whole,
    inpainting,
)
SIZES = {"encoder_channels": (8, 8), "decoder_channels": (8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
MODEL = ModelConfig(**SIZES, norm_groups=4)


def _annotated(owner):
    """The functions of a module or class, by name, that have a shape in their signature."""
    for name, value in vars(owner).items():
        if inspect.isfunction(value) and any(
            "[Array" in str(hint) or "[np.nd" in str(hint) for hint in value.__annotations__.values()
        ):
            yield name, value


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """The names of all functions that check their arguments and results."""
    names = []
    for module in MODULES:
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for owner in (module, *(c for c in classes if not getattr(c, "_is_protocol", False))):
            for name, function in _annotated(owner):
                monkeypatch.setattr(owner, name, jaxtyped(function, typechecker=beartype))
                names.append(f"{owner.__name__}.{name}")
    return names


def _pictures():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, 7, 9, 3)).astype(np.float32), np.ones((2, 7, 9, 1), np.float32)


def test_the_signatures_hold_while_pictures_are_encoded_and_decoded(checked):
    assert {"Autoencoder.decode", "Encoder.__call__", "asymvq_jax.inference.whole.decode"} <= set(checked)
    image, mask = _pictures()
    model = autoencoder.Autoencoder(MODEL, rngs=nnx.Rngs(0))
    z = whole.encode(model, image)
    assert whole.decode(model, z, image, mask).shape == image.shape
    assert whole.decode(model, z).shape == (2, 8, 10, 3)
    for masks in (mask[0], mask[0, ..., 0] > 0):
        assert inpainting.inpaint(model, np.uint8(127.5 * image[0] + 127.5), masks).image.shape == (7, 9, 3)
    quantised = autoencoder.Autoencoder(
        ModelConfig(**SIZES, norm_groups=4, condition=False, codebook_size=5, latent_channels=3), rngs=nnx.Rngs(0)
    )
    assert whole.decode(quantised, whole.encode(quantised, image), size=(7, 9)).shape == image.shape


def test_the_signatures_hold_for_losses_and_latents():
    image, mask = map(jnp.asarray, _pictures())
    metric = lpips.load_lpips("alexnet")
    image, mask = jnp.tile(image, (1, 9, 9, 1)), jnp.tile(mask, (1, 9, 9, 1))
    loss, parts = reconstruction.reconstruction_loss(image, 0.5 * image, metric, 1.0, emphasis=mask, pasted=mask)
    assert loss.shape == parts["lpips"].shape == ()
    assert metric(image, image).shape == (2,)
    judge = discriminator.Discriminator(LossConfig(discriminator_features=4), MODEL, rngs=nnx.Rngs(0))
    logits = judge(image)
    assert adversarial.discriminator_hinge(logits, logits) + adversarial.generator_term(logits) != 0
    assert adversarial.adaptive_weight(image, mask * image) > 0
    latent = posterior.Posterior.from_moments(jnp.ones((1, 2, 3, 4)))
    assert latent.mode().shape == latent.sample(nnx.Rngs(0).params()).shape
    assert latent.penalties()["kl"] > 0


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("blend", ((1, 4, 4, 8), (1, 4, 4, 8), (1, 8, 8, 3))),
        ("blend", ((1, 4, 4, 8), (1, 4, 8, 8), (1, 8, 8, 1))),
    ],
)
def test_other_shapes_are_refused(function, arguments):
    with pytest.raises(TypeCheckError):
        getattr(decoder, function)(*map(jnp.zeros, arguments))
