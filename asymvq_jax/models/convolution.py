"""Convolution on NHWC that also a CPU computes fast, and whose gradient takes it little memory."""

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

# The convolution itself is faster from such chunks than XLA's where the matrix is larger still. Measured as above, on a
# day when large matrix products reached 0.14 to 0.16 TFLOP/s, minimum of 4, 3x3 kernels:
#
#     batch x side^2 x inputs -> outputs        matrix       XLA    chunks
#     1 x 256^2 x 256 -> 256                   576 MiB       784       562
#     1 x 256^2 x 512 -> 256                  1152 MiB      1661      1280
#     1 x 256^2 x 256 -> 128                   576 MiB       415       346
#     1 x 128^2 x 512 -> 512                   288 MiB       684       539
#     1 x 128^2 x 512 -> 256                   288 MiB       382       340
#     1 x 128^2 x 1024 -> 512                  576 MiB      1437      1145
#     below:
#     1 x 128^2 x 256 -> 256                   144 MiB       141       134
#     1 x 64^2 x 1024 -> 512                   144 MiB       267       295
#     2 x 64^2 x 640 -> 320                    180 MiB       266       299
#     1 x 256^2 x 128 -> 128                   288 MiB       163       205
MIN_FORWARD_BYTES = 256 * 2**20
MIN_FORWARD_INPUTS = 256

# XLA's convolution on the CPU is slow where the kernel has more numbers than that matrix, which is where the output has
# no more pixels than channels: there it is one product of the two. Measured as above, minimum of 7, 3x3 kernels:
#
#     batch x side^2 x inputs -> outputs        XLA    product
#     2 x 16^2 x 1280 -> 1280                 127.9      105.5
#     2 x 16^2 x 2560 -> 1280                 234.8      189.1
#     2 x 16^2 x 640 -> 1280                   45.2       46.1
#     2 x 8^2 x 1280 -> 1280                   62.7       26.3
#     2 x 8^2 x 2560 -> 1280                  105.0       49.2
#     2 x 4^2 x 1280 -> 1280                   14.8        9.7
#     16 x 8^2 x 1280 -> 1280                 192.0      180.2
#     1 x 16^2 x 512 -> 512                     8.4        7.9
#     more pixels than channels:
#     1 x 32^2 x 512 -> 512                    28.5       39.9
#     2 x 32^2 x 640 -> 640                    89.1      117.7
#     8 x 16^2 x 512 -> 512                    55.7       79.3


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
    if _devices() == 1:
        if _matrix_bytes(x, kernel, stride, padding) >= MIN_MATRIX_BYTES and x.shape[-1] >= MIN_INPUTS:
            return _with_chunked_gradient(x, kernel, stride, padding)
        *pixels, outputs = _output_shape(x.shape, kernel.shape, stride, padding)
        if math.prod(pixels) <= outputs and math.prod(kernel.shape[:2]) > 1 and x.dtype == jnp.float32:
            return _as_product(x, kernel, stride, padding)
    return _convolve(x, kernel, stride=stride, padding=padding)


def _convolve(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides=(stride, stride), padding=padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _devices() -> int:
    """Of the current mesh: over several, the compiler splits its own gradient better than the loop over chunks."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values())


def _output_shape(
    x: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Padding
) -> tuple[int, int, int, int]:
    height, width = (
        (side + sum(zeros) - size) // stride + 1 for side, size, zeros in zip(x[1:3], kernel[:2], padding, strict=True)
    )
    return x[0], height, width, kernel[3]


def _matrix_bytes(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> int:
    """Of all that lies under the kernel at each pixel of the output, in float32."""
    return 4 * math.prod(_output_shape(x.shape, kernel.shape, stride, padding)[:3]) * math.prod(kernel.shape[:3])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _as_product(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """`_convolve`, on a CPU as one product of matrices; where gradients are taken, all is the compiler's own."""
    product, compilers = (partial(f, stride=stride, padding=padding) for f in (_product, _convolve))
    return jnp.asarray(jax.lax.platform_dependent(x, kernel, cpu=product, default=compilers))


def _product(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    rows, columns, _, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (x.shape[1] - rows) // stride, (x.shape[2] - columns) // stride
    matrix = _under(x, (rows, columns), (stride * height + 1, stride * width + 1), stride)
    return matrix @ kernel.reshape(-1, outputs)


def _under(x: jax.Array, kernel_size: tuple[int, int], reach: tuple[int, int], stride: int) -> jax.Array:
    """(..., h, w, inputs) -> (..., h', w', rows * columns * inputs): what lies under a kernel at each pixel.

    Args:
        x: padded.
        kernel_size: rows and columns.
        reach: the last row, and column, that is read from each element of the kernel on, exclusive.
        stride: as in `convolve`.
    """
    down, across = kernel_size
    shifted = [
        x[..., i : i + reach[0] : stride, j : j + reach[1] : stride, :] for i in range(down) for j in range(across)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _at_input(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    (at_x,) = jax.linear_transpose(partial(_convolve, kernel=kernel, stride=stride, padding=padding), x)(cotangent)
    return jnp.asarray(at_x)


def _at_kernel(x: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    (at_kernel,) = jax.linear_transpose(partial(_convolve, x, stride=stride, padding=padding), kernel)(cotangent)
    return jnp.asarray(at_kernel)


def _compilers(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    at_x, at_kernel = (f(*residuals, cotangent, stride=stride, padding=padding) for f in (_at_input, _at_kernel))
    return at_x, at_kernel


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_chunked_gradient(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    compilers = partial(_convolve, stride=stride, padding=padding)
    large = _matrix_bytes(x, kernel, stride, padding) >= MIN_FORWARD_BYTES and x.shape[-1] >= MIN_FORWARD_INPUTS
    if not large or x.dtype != jnp.float32:
        return compilers(x, kernel)
    chunked = partial(_in_chunks, stride=stride, padding=padding)
    return jnp.asarray(jax.lax.platform_dependent(x, kernel, cpu=chunked, default=compilers))


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _with_chunked_gradient(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    at_x = _at_input(x, kernel, cotangent, stride=stride, padding=padding)

    def compilers(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return _at_kernel(x, kernel, cotangent, stride=stride, padding=padding)

    rows, columns = kernel.shape[:2]
    chunked = partial(_kernel_gradient, kernel_size=(rows, columns), stride=stride, padding=padding)
    # Settled when the program is lowered, for the platform that it is lowered for.
    return at_x, jax.lax.platform_dependent(x, cotangent, cpu=chunked, default=compilers)


_with_chunked_gradient.defvjp(_forward, _backward)
_as_product.defvjp(_forward, _compilers)


def _in_chunks(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """`_convolve`, as one product of matrices for each chunk of rows of one picture."""
    rows, columns, _, outputs = kernel.shape
    shape = _output_shape(x.shape, kernel.shape, stride, padding)
    chunks = _Chunks(x, shape, (rows, columns), stride, padding)

    def multiply(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        return None, chunks.under(index) @ kernel.reshape(-1, outputs)

    _, y = jax.lax.scan(multiply, None, jnp.arange(chunks.count))
    return y.reshape(shape)


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
    inputs, outputs = x.shape[-1], cotangent.shape[-1]
    chunks = _Chunks(x, cotangent.shape, kernel_size, stride, padding)

    def add(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        above = chunks.rows_of(cotangent, index).astype(jnp.float32)
        return total + above.T @ chunks.under(index).astype(jnp.float32), None

    zeros = jnp.zeros((outputs, math.prod(kernel_size) * inputs), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(chunks.count))
    return total.T.reshape(*kernel_size, inputs, outputs).astype(x.dtype)


class _Chunks:
    """What lies under a kernel at each pixel of the output, by chunks of whole rows of one picture."""

    def __init__(
        self, x: jax.Array, output: tuple[int, ...], kernel_size: tuple[int, int], stride: int, padding: Padding
    ) -> None:
        _, height, self._width, _ = output
        self._padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        self._kernel_size, self._stride = kernel_size, stride
        self._elements = math.prod(kernel_size) * x.shape[-1]
        row_bytes = 4 * self._width * self._elements
        self._rows = max(
            r for r in range(1, height + 1) if height % r == 0 and (r == 1 or r * row_bytes <= CHUNK_BYTES)
        )
        self._of_one = height // self._rows
        self.count = output[0] * self._of_one

    def under(self, index: jax.Array) -> jax.Array:
        """(rows * w', elements of the kernel times inputs), of one chunk."""
        picture, first = self._place(index)
        reach = (self._stride * (self._rows - 1) + 1, self._stride * (self._width - 1) + 1)
        _, _, width, inputs = self._padded.shape
        size = (1, reach[0] + self._kernel_size[0] - 1, width, inputs)
        rows = jax.lax.dynamic_slice(self._padded, (picture, first * self._stride, 0, 0), size)[0]
        matrix = _under(rows, self._kernel_size, reach, self._stride)
        return matrix.reshape(self._rows * self._width, self._elements)

    def rows_of(self, y: jax.Array, index: jax.Array) -> jax.Array:
        """The same pixels of a map with the output's sides: (rows * w', channels)."""
        picture, first = self._place(index)
        rows = jax.lax.dynamic_slice(y, (picture, first, 0, 0), (1, self._rows, self._width, y.shape[-1]))
        return rows.reshape(self._rows * self._width, y.shape[-1])

    def _place(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The picture and the first row of the output."""
        return index // self._of_one, index % self._of_one * self._rows
