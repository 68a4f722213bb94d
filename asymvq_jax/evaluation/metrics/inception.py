"""The Inception-v3 (arXiv 1512.00567) of published FID, KID and Inception Scores: TensorFlow's of 2015, 1008 classes.

Its weights come from a file that the user names, in the form that pytorch-fid and torch-fidelity share; pictures are
resized and scores taken as torch-fidelity does it. Packages for JAX that were looked at in November 2026: fidax 0.3.1
(FID alone, and its resizing smooths), jax-fid 0.0.2 (FID alone, of 2021), fidjax 1.0.1 (cannot be installed) and
flaxmodels 0.1.3 (has no Inception).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax.errors import InceptionError
from asymvq_jax.files.stored import misfits
from asymvq_jax.files.weights import read_tensors
from asymvq_jax.models.parameters import Params

SIZE = 299
FEATURES, CLASSES = 2048, 1008
NORM = ("weight", "bias", "running_mean", "running_var")
# In some files, but no part of what is computed: PyTorch's counters, the head that only training has, the last bias
# (scores take the logits without it, as the first published code did).
_UNUSED = re.compile(r".*\.num_batches_tracked|AuxLogits\..*|fc\.bias")

# (name, input, output channels, kernel size, *, stride, same) -> convolution, batch normalisation and ReLU.
_Conv = Callable[..., jax.Array]


def resize(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (299, 299, 3) float32 in [0, 255], bilinear as TensorFlow 1 did it.

    Corner pixels' centres are not aligned, and nothing is averaged where a picture shrinks.
    """
    x = image.astype(np.float32)
    for axis in (0, 1):
        position = np.arange(SIZE, dtype=np.float32) * np.float32(x.shape[axis] / SIZE)
        low = np.minimum(position.astype(np.int64), x.shape[axis] - 1)
        share = np.expand_dims(position - low, [a for a in range(3) if a != axis]).astype(np.float32)
        first, second = x.take(low, axis), x.take(np.minimum(low + 1, x.shape[axis] - 1), axis)
        x = first + (second - first) * share
    return x


def inception(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features and logits.

    Args:
        params: from `load_inception`.
        images: (b, 299, 299, 3) float32 in [0, 255], from `resize`.

    Returns:
        (b, 2048), the means over the last map, and (b, 1008), the classes' logits without their bias; float32.
    """

    def conv(name: str, x: jax.Array, outputs: int, size: tuple[int, int], *, stride: int, same: bool) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            params[f"{name}.kernel"],
            (stride, stride),
            "SAME" if same else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(y + params[f"{name}.bias"][None, None, None])

    features = _network(conv, (images - 128.0) / 128.0)
    return features, features @ params["fc.kernel"]


def _network(conv: _Conv, x: jax.Array) -> jax.Array:
    """From (b, 299, 299, 3) to the (b, 2048) features, through `conv`."""
    valid, same = partial(conv, stride=1, same=False), partial(conv, stride=1, same=True)
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2, same=False)
    x = valid("Conv2d_2a_3x3", x, 32, (3, 3))
    x = _max_pool(same("Conv2d_2b_3x3", x, 64, (3, 3)), 2)
    x = valid("Conv2d_3b_1x1", x, 80, (1, 1))
    x = _max_pool(valid("Conv2d_4a_3x3", x, 192, (3, 3)), 2)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(same, f"{name}.branch", x, pooled)
    x = _block_b(conv, "Mixed_6a.branch", x)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _block_c(same, f"{name}.branch", x, width)
    x = _block_d(conv, "Mixed_7a.branch", x)
    x = _block_e(same, "Mixed_7b.branch", x, _average_pool)
    # The last block takes the maximum where the one before takes the mean, in these weights' network.
    x = _block_e(same, "Mixed_7c.branch", x, partial(_max_pool, stride=1))
    return jnp.mean(x, (1, 2))


def _chain(conv: _Conv, x: jax.Array, *layers: tuple[str, int, tuple[int, int]]) -> jax.Array:
    for name, outputs, size in layers:
        x = conv(name, x, outputs, size)
    return x


def _block_a(same: _Conv, name: str, x: jax.Array, pooled: int) -> jax.Array:
    double = [(f"{name}3x3dbl_1", 64, (1, 1)), (f"{name}3x3dbl_2", 96, (3, 3)), (f"{name}3x3dbl_3", 96, (3, 3))]
    parts = [
        same(f"{name}1x1", x, 64, (1, 1)),
        _chain(same, x, (f"{name}5x5_1", 48, (1, 1)), (f"{name}5x5_2", 64, (5, 5))),
        _chain(same, x, *double),
        same(f"{name}_pool", _average_pool(x), pooled, (1, 1)),
    ]
    return jnp.concatenate(parts, -1)


def _block_b(conv: _Conv, name: str, x: jax.Array) -> jax.Array:
    same, down = partial(conv, stride=1, same=True), partial(conv, stride=2, same=False)
    double = _chain(same, x, (f"{name}3x3dbl_1", 64, (1, 1)), (f"{name}3x3dbl_2", 96, (3, 3)))
    parts = [down(f"{name}3x3", x, 384, (3, 3)), down(f"{name}3x3dbl_3", double, 96, (3, 3)), _max_pool(x, 2)]
    return jnp.concatenate(parts, -1)


def _block_c(same: _Conv, name: str, x: jax.Array, width: int) -> jax.Array:
    row, column = (1, 7), (7, 1)
    seven = [(f"{name}7x7_1", width, (1, 1)), (f"{name}7x7_2", width, row), (f"{name}7x7_3", 192, column)]
    double = [(f"{name}7x7dbl_1", width, (1, 1))]
    double += [(f"{name}7x7dbl_{i}", 192 if i == 5 else width, row if i % 2 else column) for i in range(2, 6)]
    parts = [
        same(f"{name}1x1", x, 192, (1, 1)),
        _chain(same, x, *seven),
        _chain(same, x, *double),
        same(f"{name}_pool", _average_pool(x), 192, (1, 1)),
    ]
    return jnp.concatenate(parts, -1)


def _block_d(conv: _Conv, name: str, x: jax.Array) -> jax.Array:
    same, down = partial(conv, stride=1, same=True), partial(conv, stride=2, same=False)
    seven = [(f"{name}7x7x3_{i}", 192, size) for i, size in enumerate(((1, 1), (1, 7), (7, 1)), 1)]
    parts = [
        down(f"{name}3x3_2", same(f"{name}3x3_1", x, 192, (1, 1)), 320, (3, 3)),
        down(f"{name}7x7x3_4", _chain(same, x, *seven), 192, (3, 3)),
        _max_pool(x, 2),
    ]
    return jnp.concatenate(parts, -1)


def _block_e(same: _Conv, name: str, x: jax.Array, pool: Callable[[jax.Array], jax.Array]) -> jax.Array:
    def both(prefix: str, x: jax.Array) -> list[jax.Array]:
        return [same(f"{prefix}a", x, 384, (1, 3)), same(f"{prefix}b", x, 384, (3, 1))]

    three = same(f"{name}3x3_1", x, 384, (1, 1))
    double = _chain(same, x, (f"{name}3x3dbl_1", 448, (1, 1)), (f"{name}3x3dbl_2", 384, (3, 3)))
    parts = [same(f"{name}1x1", x, 320, (1, 1)), *both(f"{name}3x3_2", three), *both(f"{name}3x3dbl_3", double)]
    return jnp.concatenate([*parts, same(f"{name}_pool", pool(x), 192, (1, 1))], -1)


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    padding = "SAME" if stride == 1 else "VALID"
    most: jax.Array = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)
    return most


def _average_pool(x: jax.Array) -> jax.Array:
    """Means over 3x3 pixels, of those that exist."""

    def total(x: jax.Array) -> jax.Array:
        sums: jax.Array = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        return sums

    return total(x) / total(jnp.ones_like(x[:1, :, :, :1]))


def _convolutions() -> dict[str, tuple[int, int, int, int]]:
    """The kernels' shapes (height, width, inputs, outputs) by layer, as the network itself uses them."""
    shapes = {}

    def record(name: str, x: jax.Array, outputs: int, size: tuple[int, int], *, stride: int, same: bool) -> jax.Array:
        shapes[name] = (*size, x.shape[-1], outputs)
        height, width = ((s if same else s - k + 1) for s, k in zip(x.shape[1:3], size, strict=True))
        return jnp.zeros((1, -(-height // stride), -(-width // stride), outputs))

    jax.eval_shape(lambda x: _network(record, x), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return shapes


def load_inception(path: str | Path) -> Params:
    """Reads the weights of pytorch-fid or torch-fidelity (`...inception-2015-12-05...pth`, or the same as safetensors).

    Returns:
        For every layer a kernel (h, w, in, out) and a bias, the batch normalisations folded into both; and the last
        layer's kernel.

    Raises:
        UserError: the file is missing or unreadable, or tensors are missing, unexpected or misshapen.
    """
    tensors = {name: x for name, x in read_tensors(path).items() if not _UNUSED.fullmatch(name)}
    convolutions = _convolutions()
    expected: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, FEATURES)}
    for name, (height, width, inputs, outputs) in convolutions.items():
        expected[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        expected |= {f"{name}.bn.{leaf}": (outputs,) for leaf in NORM}
    if problems := misfits(tensors, expected):
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise InceptionError(
            f"{path} is not the Inception-v3 of FID (pytorch-fid's or torch-fidelity's weights file):\n  "
            + "\n  ".join(shown)
        )
    params = {"fc.kernel": tensors["fc.weight"].T}
    for name in convolutions:
        gain, bias, mean, variance = (tensors[f"{name}.bn.{leaf}"].astype(np.float64) for leaf in NORM)
        scale = gain / np.sqrt(variance + 1e-3)
        params[f"{name}.kernel"] = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
        params[f"{name}.bias"] = bias - mean * scale
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
