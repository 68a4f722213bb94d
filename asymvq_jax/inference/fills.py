"""Several fills of one picture: what does not depend on the latent is computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from asymvq_jax.files import images
from asymvq_jax.inference.inpainting import InpaintResult, check_image, check_mask, inpaint
from asymvq_jax.inference.whole import check_condition, encode, pad
from asymvq_jax.models.autoencoder import Autoencoder

Array = npt.NDArray[Any]


@nnx.jit
def _condition(model: Autoencoder, image: jax.Array, mask: jax.Array) -> list[jax.Array]:
    return model.decoder.condition_features(image, mask)


@nnx.jit
def _decode(model: Autoencoder, z: jax.Array, features: list[jax.Array], mask: jax.Array) -> jax.Array:
    return model.decode_with(z, features, mask)


class Fills:
    """A picture with its mask, into which any number of latents are decoded.

    The picture's condition features are computed with the first of them and stay in the device's memory: 0.14 GiB for
    256 x 256 px and the base model in float32. The picture is encoded at most once, when its own latent is needed.
    """

    def __init__(self, model: Autoencoder, image: Array, mask: Array) -> None:
        """Checks the picture.

        Args:
            model: an autoencoder with a condition branch.
            image: (h, w, 3) uint8, of any size.
            mask: (h, w) or (h, w, 1); bool, or numbers in [0, 1]: 1 = generate, 0 = preserve.

        Raises:
            InputError: an array has a wrong shape or type, their sizes differ, or the model cannot preserve anything.
        """
        check_condition(model.config)
        self.model = model
        self.image = check_image(image)
        self.mask = check_mask(mask, self.image)

    @cached_property
    def own(self) -> jax.Array:
        """The picture's own latent, (1, h / 8, w / 8, c), as `encode` returns it."""
        return encode(self.model, np.asarray(images.to_float(self.image))[None])

    @cached_property
    def _held(self) -> tuple[list[jax.Array], jax.Array]:
        multiple = self.model.config.downsampling
        image, mask = pad(np.asarray(images.to_float(self.image))[None], multiple), pad(self.mask[None], multiple)
        return _condition(self.model, image, mask), mask

    def decode(self, latents: jax.Array | Array) -> jax.Array:
        """Latents (b, h / 8, w / 8, c) as `encode` returns them -> (b, h, w, 3) float32, not clipped."""
        height, width = self.image.shape[:2]
        features, mask = self._held
        return _decode(self.model, jnp.asarray(latents), features, mask)[:, :height, :width]

    def inpaint(self, latent: Array | None = None, **options: Any) -> InpaintResult:
        """As `inference.inpaint` of this picture; `options` are that function's."""
        return inpaint(
            self.model, self.image, self.mask, latent,
            encode=lambda *_: self.own, decode=lambda _, z, *__: self.decode(z), **options,
        )  # fmt: skip
