"""The whole autoencoder: frozen encoder, 1x1 convolutions around the latent, asymmetric decoder."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx
from jaxtyping import Array, Float

from asymvq_jax.config import ModelConfig
from asymvq_jax.models.causal import layers_of
from asymvq_jax.models.codebook import Codebook
from asymvq_jax.models.decoder import Decoder, grow
from asymvq_jax.models.encoder import Encoder
from asymvq_jax.models.latent import Normalization, Statistics, normalization
from asymvq_jax.models.parameters import Params, merge, seeded, split
from asymvq_jax.models.posterior import Latent, Posterior


class Autoencoder(nnx.Module):
    """Encoder and decoder of unequal size around one latent space (paper, figure 2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        latent, layers = config.latent_channels, layers_of(config.encoder_layers, config)
        self.encoder = Encoder(config, rngs=rngs)
        outputs = config.encoder_outputs
        self.quant_conv = layers.conv(outputs, outputs, 1, rngs=rngs) if config.quant_conv else None
        self.post_quant_conv = layers.conv(latent, latent, 1, rngs=rngs) if config.quant_conv else None
        self.decoder = Decoder(config, rngs=rngs)
        self.codebook = Codebook(config.codebook_size, latent, rngs=rngs) if config.codebook_size else None
        self.statistics = Statistics(latent * config.latent_patch**2) if config.batch_norm_epsilon else None

    def encode(self, image: Float[Array, "b h w c"]) -> Latent:
        """(b, h, w, 3) in [-1, 1] -> the latent, (b, h/8, w/8, latent_channels), before any scaling.

        Raises:
            ValueError: h or w is not a multiple of the model's downsampling (asymvq_jax.inference pads for you).
        """
        self._check(image, "image", self.config.image_channels, multiple=self.config.downsampling)
        return self.latent(self.encoder(image))

    def latent(self, x: Float[Array, "b h w c"]) -> Latent:
        """What the encoder's output, (b, h, w, encoder_outputs), says about the latent."""
        x = x if self.quant_conv is None else self.quant_conv(x)
        return Posterior.from_moments(x) if self.codebook is None else self.codebook(x)

    def normalization(self) -> Normalization:
        """How a diffusion model sees the latent that `encode` gives."""
        return normalization(self.config, self.statistics)

    def quantize(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h w z"]:
        """The vectors of the codes nearest to `z`, (b, h, w, latent_channels); `z` itself without a codebook."""
        return z if self.codebook is None else self.codebook(z).nearest

    def decode(
        self,
        z: Float[Array, "b y x z"],
        image: Float[Array, "#b h w c"] | None = None,
        mask: Float[Array, "#b h w 1"] | None = None,
        *,
        margin: int = 0,
    ) -> Float[Array, "b h w c"]:
        """Latent to image, float32, about [-1, 1] (not clipped).

        Args:
            z: (b, h, w, latent_channels), the mode that `encode` gives or an edited one, not scaled for the diffusion
                model; where there is a codebook, it is quantised first.
            image: (b, 8h, 8w, 3) in [-1, 1]; with `mask`, the picture whose unmasked pixels are to be kept.
            mask: (b, 8h, 8w, 1), 1 = generate, 0 = preserve. One image with one mask serves any number of latents, and
                its condition is then computed once.
            margin: for a result of which only the masked pixels are used: the decoder preserves none within so many px
                of the mask, so that its own features, not the condition's, meet at the edge.

        Raises:
            ValueError: only one of image and mask, or shapes that do not agree.
        """
        self._check(z, "z", self.config.latent_channels)
        generated = mask if mask is None or not margin else grow(mask, margin)
        features = self.decode_features(self.quantize(z), image, generated)
        return self.decoder.toned(self.decoder.to_image(features), image, mask)

    def decode_features(
        self, z: Float[Array, "b y x z"], image: Float[Array, "#b h w c"] | None, mask: Float[Array, "#b h w 1"] | None
    ) -> Float[Array, "b h w features"]:
        """The features under the decoder's last convolution; arguments as in `decode`, but `z` is taken as it is."""
        self._check(z, "z", self.config.latent_channels)
        if (image is None) != (mask is None):
            raise ValueError("decode takes image and mask together, or neither (text-to-image)")
        if image is not None and mask is not None:
            sides = (z.shape[1] * self.config.downsampling, z.shape[2] * self.config.downsampling)
            # One picture may stand for all: what its condition is does not depend on the latent.
            full = (1 if len(image) == len(mask) == 1 else z.shape[0], *sides)
            for name, value, channels in (("image", image, self.config.image_channels), ("mask", mask, 1)):
                if value.shape != (*full, channels):
                    raise ValueError(
                        f"{name} has shape {value.shape}: expected {(*full, channels)} for a latent of shape {z.shape}"
                    )
        return self.decoder.features(z if self.post_quant_conv is None else self.post_quant_conv(z), image, mask)

    def decode_with(
        self, z: Float[Array, "b y x z"], features: list[Float[Array, "_ _ _ _"]], mask: Float[Array, "#b h w 1"]
    ) -> Float[Array, "b h w c"]:
        """As `decode`, with features that `decoder.condition_features` has made of a picture and this mask."""
        self._check(z, "z", self.config.latent_channels)
        z = self.quantize(z)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder.to_image(self.decoder.features_with(z, features, mask))

    def _check(self, x: Array, name: str, channels: int, multiple: int = 1) -> None:
        if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % multiple or x.shape[2] % multiple:
            sides = f"height and width multiples of {multiple}" if multiple > 1 else "height, width"
            raise ValueError(f"{name} has shape {x.shape}: expected (batch, {sides}, {channels} channels last)")


def structure(config: ModelConfig) -> tuple[nnx.GraphDef[Autoencoder], Params]:
    """The graph definition and the parameters' shapes (by name) of a model; allocates nothing."""
    graphdef, shapes = _structure(config)
    return graphdef, dict(shapes)


# Tracing base's initialisers takes 0.3 s, and reading one model asks several times.
@functools.lru_cache(maxsize=8)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef[Autoencoder], Params]:
    return split(nnx.eval_shape(lambda: Autoencoder(config, rngs=seeded(0))))


def in_dtype(model: Autoencoder, dtype: str) -> Autoencoder:
    """The model with the same parameters, computing in `dtype`."""
    return merge(structure(dataclasses.replace(model.config, dtype=dtype))[0], split(model)[1])
