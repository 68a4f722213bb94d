"""Exports the decoder for a server: asymvq export.

The file holds the program (StableHLO) and the weights; it runs without this package, on every platform it was made for:

    from jax import export
    decode = export.deserialize(bytearray(open("decoder.jax", "rb").read())).call
    image = decode(latent, image, mask)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import export

from asymvq_jax.errors import ExportError
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import merge, split

SUFFIX = ".jax"
PLATFORMS = ("cpu", "cuda", "tpu")


def export_decoder(
    model: Autoencoder, batch: int, size: tuple[int, int], platforms: Sequence[str] = PLATFORMS
) -> export.Exported:
    """The decoder as a program with the weights inside, in the model's compute dtype.

    Args:
        model: the autoencoder.
        batch: pictures a call.
        size: their height and width, px.
        platforms: where it is to run.

    Returns:
        A function of latent (b, h/8, w/8, latent_channels), not scaled; and, where the model has a condition branch,
        image (b, h, w, 3) in [-1, 1] and mask (b, h, w, 1), 1 = generate. All float32, as is the result (b, h, w, 3).

    Raises:
        ExportError: the size is not a multiple of the model's downsampling, or the batch is empty.
    """
    config = model.config
    factor = config.downsampling
    if batch < 1 or min(size) < factor or any(side % factor for side in size):
        raise ExportError(
            f"batch {batch} of {size[0]} x {size[1]} px: expected at least 1, of sides that are multiples of {factor}"
        )
    # The encoder is not part of the program: its shapes fill its place in the model's structure.
    graphdef, parameters = structure(config)
    for name, value in split(model)[1].items():
        if not name.startswith("encoder."):
            parameters[name] = value.astype(config.dtype) if value.ndim == 4 else value

    def decode(*arguments: jax.Array) -> jax.Array:
        return merge(graphdef, parameters).decode(*arguments)

    height, width = size
    given = [(height // factor, width // factor, config.latent_channels)]
    if config.condition:
        given += [(height, width, config.image_channels), (height, width, 1)]
    return export.export(jax.jit(decode), platforms=platforms)(
        *(jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in given)
    )
