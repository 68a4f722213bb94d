"""What convolutions in int8 cost in quality: asymvq benchmark int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.config import DataConfig
from asymvq_jax.data.sources import open_sources
from asymvq_jax.evaluation.metrics.image import decibels
from asymvq_jax.files import images
from asymvq_jax.models import blocks
from asymvq_jax.models.checkpoints import load_model
from asymvq_jax.models.convolution import convolve
from asymvq_jax.models.parameters import jitted
from benchmarks.embed import ellipse, square


@dataclass(frozen=True, kw_only=True)
class Int8:
    """How far the decode with all convolutions in int8 is from that in bfloat16, on photographs in Python packages."""

    # A checkpoint, or a model inside the package.
    checkpoint: str = "tiny"
    # The photographs' shorter side, to which they are reduced; the square in the middle is decoded. px.
    size: int = 256


def work(options: Int8) -> None:
    """Measures, and prints the PSNR."""
    model = load_model(options.checkpoint, dtype="bfloat16")
    program = jitted(lambda model, *arrays: model.decode(*arrays))
    mask, found = ellipse(options.size, options.size)[None], []
    for source in open_sources(DataConfig(source="photos")):
        for pixels in (images.to_float(square(source.read(i), options.size))[None] for i in range(len(source))):
            latent = inference.encode(model, pixels)
            expected = inference.decode(model, latent, pixels, mask)
            # When the program is traced, the layers find this convolution in the place of theirs.
            with patch.object(blocks, "convolve", in_int8):
                decoded = program(model, latent, pixels, mask)
            error = np.clip(decoded, -1, 1, dtype=np.float32) - np.clip(expected, -1, 1, dtype=np.float32)
            found.append(decibels(float(np.mean(np.square(error)))))
    print(f"{options.checkpoint}, {len(found)} photographs of {options.size} px: int8 to bfloat16 "
          f"{np.mean(found):.1f} dB, at worst {min(found):.1f} dB")  # fmt: skip


def rounded(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The nearest integers from -127 to 127 times a scale, one along `axes` and as small as it can be; float32."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), 1e-30) / 127
    return jnp.round(x / scale) * scale


def in_int8(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """`convolve`, but for the rounding: of the kernel by output channel, of what goes into it as a whole."""
    return convolve(rounded(x, (0, 1, 2, 3)), rounded(kernel, (0, 1, 2)), **options).astype(x.dtype)


main = command("asymvq benchmark int8", Int8, work)
