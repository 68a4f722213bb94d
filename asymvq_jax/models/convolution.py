"""Convolution on NHWC with a gradient of the kernel that also a CPU computes fast, and in little memory."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]

# XLA's gradient of a kernel on the CPU goes through all that lies under the kernel at each pixel of the output, and is
# slow where that, as one matrix, is large: from so many bytes and inputs on, it is made and used in chunks of rows.
# ms on two (shared) cores of an AMD EPYC, float32, jax 0.10.2, interleaved, minimum of 6 or of what fits in 8 s:
#
#     batch x side^2 x inputs -> outputs        matrix       XLA    chunks
#     1 x 128^2 x 128 -> 128  3x3               72 MiB      74.2      65.3
#     1 x 128^2 x 128 -> 3    3x3               72 MiB      94.6       8.0
#     4 x 32^2 x 512 -> 512   3x3               72 MiB     241.4     216.5
#     1 x 256^2 x 128 -> 128  3x3, stride 2     72 MiB     196.3      84.9
#     1 x 256^2 x 128 -> 256  4x4, stride 2    128 MiB     720.5     307.8
#     1 x 128^2 x 512 -> 512  2x2              128 MiB    1408.3     394.8
#     1 x 256^2 x 128 -> 128  3x3              288 MiB     980.9     277.1
#     1 x 256^2 x 128 -> 3    3x3              288 MiB     329.8      49.3
#     4 x 64^2 x 512 -> 512   3x3              288 MiB    2372.0    1025.8
#     4 x 128^2 x 256 -> 256  3x3              576 MiB    6633.2    1013.3
#     2 x 256^2 x 128 -> 128  3x3              576 MiB    3676.8     544.3
#     below:
#     1 x 64^2 x 256 -> 256   3x3               36 MiB      54.1      63.2
#     1 x 32^2 x 512 -> 512   3x3               18 MiB      52.9      56.7
#     1 x 256^2 x 64 -> 64    3x3              144 MiB      66.7      90.6
#     8 x 128^2 x 32 -> 32    3x3              144 MiB      49.7      72.6
MIN_MATRIX_BYTES = 64 * 2**20
MIN_INPUTS = 128
# Bytes of one chunk of the matrix, if one row of the output does not need more.
CHUNK_BYTES = 5 * 2**20


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """The convolution, with zeros around, of two arrays of one type; differentiable in reverse mode, once.

    Args:
        x: (b, h, w, inputs).
        kernel: (rows, columns, inputs, outputs).
        stride: of rows and of columns.
        padding: zeros before and after the rows, and before and after the columns.

    Returns:
        (b, h', w', outputs).
    """
    large = _matrix_bytes(x.shape, kernel.shape, stride, padding) >= MIN_MATRIX_BYTES and x.shape[-1] >= MIN_INPUTS
    if large and _devices() == 1:
        return _with_chunked_gradient(x, kernel, stride, padding)
    return _convolve(x, kernel, stride=stride, padding=padding)


def _convolve(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides=(stride, stride), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _devices() -> int:
    """Of the current mesh: over several, the compiler splits its own gradient better than the loop over chunks."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def _matrix_bytes(x: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Padding) -> int:
    """Bytes, in float32, of what lies under the kernel at all pixels of the output."""
    height, width = (
        (side + sum(zeros) - size) // stride + 1 for side, size, zeros in zip(x[1:3], kernel[:2], padding, strict=True)
    )
    return 4 * x[0] * height * width * math.prod(kernel[:3])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_chunked_gradient(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return _convolve(x, kernel, stride=stride, padding=padding)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, stride=stride, padding=padding), (x, kernel)


def _backward(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    convolution = partial(_convolve, stride=stride, padding=padding)
    (at_x,) = jax.linear_transpose(partial(convolution, kernel=kernel), x)(cotangent)

    def compilers(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        (at_kernel,) = jax.linear_transpose(partial(convolution, x), kernel)(cotangent)
        return jnp.asarray(at_kernel)

    rows, columns = kernel.shape[:2]
    chunked = partial(_kernel_gradient, kernel_size=(rows, columns), stride=stride, padding=padding)
    # Settled when the program is lowered, for the platform that it is lowered for.
    return at_x, jax.lax.platform_dependent(x, cotangent, cpu=chunked, default=compilers)


_with_chunked_gradient.defvjp(_forward, _backward)


def _kernel_gradient(
    x: jax.Array, cotangent: jax.Array, *, kernel_size: tuple[int, int], stride: int, padding: Padding
) -> jax.Array:
    """The cotangent, transposed, times the shifted inputs side by side: the sum over chunks of rows of one picture.

    Args:
        x: (b, h, w, inputs).
        cotangent: (b, h', w', outputs).
        kernel_size: rows and columns of the kernel.
        stride: as in `convolve`.
        padding: as in `convolve`.

    Returns:
        (rows, columns, inputs, outputs), summed in float32.
    """
    batch, height, width, outputs = cotangent.shape
    inputs, (down, across) = x.shape[-1], kernel_size
    elements = down * across * inputs
    rows = max(
        r for r in range(1, height + 1) if height % r == 0 and (r == 1 or 4 * r * width * elements <= CHUNK_BYTES)
    )
    chunks = height // rows
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # The last row, and column, of the input that a chunk reads from each element of the kernel on, exclusive.
    row_reach, column_reach = stride * (rows - 1) + 1, stride * (width - 1) + 1

    def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        picture, first = index // chunks, index % chunks * rows
        size = (1, row_reach + down - 1, x.shape[2], inputs)
        under = jax.lax.dynamic_slice(x, (picture, first * stride, 0, 0), size)[0].astype(jnp.float32)
        shifted = [
            under[i : i + row_reach : stride, j : j + column_reach : stride] for i in range(down) for j in range(across)
        ]
        matrix = jnp.concatenate(shifted, axis=-1).reshape(rows * width, elements)
        above = jax.lax.dynamic_slice(cotangent, (picture, first, 0, 0), (1, rows, width, outputs))
        return total + above.reshape(rows * width, outputs).astype(jnp.float32).T @ matrix, None

    total, _ = jax.lax.scan(add, jnp.zeros((outputs, elements), jnp.float32), jnp.arange(batch * chunks))
    return total.T.reshape(down, across, inputs, outputs).astype(x.dtype)
