"""The convolution's gradients against the compiler's own and PyTorch's, in every form in which training runs it."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.models import convolution
from asymvq_jax.models.convolution import convolve

# Picture, kernel size, outputs, stride, padding: those of the models, and odd ones.
CASES = [
    ((2, 12, 10, 5), 3, 7, 1, ((1, 1), (1, 1))),
    ((1, 13, 9, 4), 3, 3, 1, ((1, 1), (1, 1))),
    ((2, 8, 12, 3), 2, 6, 1, ((1, 0), (0, 1))),
    ((2, 9, 7, 6), 1, 5, 1, ((0, 0), (0, 0))),
    ((2, 12, 8, 5), 3, 4, 2, ((0, 1), (0, 1))),
    ((1, 12, 12, 3), 4, 5, 2, ((1, 1), (1, 1))),
    ((1, 11, 9, 3), 3, 5, 2, ((1, 1), (0, 1))),
    ((2, 9, 11, 3), 3, 5, 1, ((0, 0), (1, 1))),
]


@pytest.fixture(autouse=True)
def _always_in_chunks(monkeypatch):
    monkeypatch.setattr(convolution, "MIN_FORWARD_BYTES", 0)
    monkeypatch.setattr(convolution, "MIN_FORWARD_INPUTS", 0)
    monkeypatch.setattr(convolution, "MIN_MATRIX_BYTES", 0)
    monkeypatch.setattr(convolution, "MIN_INPUTS", 0)
    # Several rows a chunk, and several chunks a picture.
    monkeypatch.setattr(convolution, "CHUNK_BYTES", 8 * 1024)


def _arrays(shape, size, outputs, dtype="float32"):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    kernel = rng.standard_normal((size, size, shape[-1], outputs), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def _gradients(function, x, kernel):
    """Of a sum of the output with weights that differ, with respect to both."""
    y, pull = jax.vjp(function, x, kernel)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype)
    return y, *pull(weights)


def _close(ours, expected, tolerance=1e-5):
    for a, b in zip(ours, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_equals_the_compilers(case, chunk_bytes, monkeypatch):
    shape, size, outputs, stride, padding = case
    monkeypatch.setattr(convolution, "CHUNK_BYTES", chunk_bytes)
    x, kernel = _arrays(shape, size, outputs)

    def expected(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    function = partial(convolve, stride=stride, padding=padding)
    _close(jax.jit(partial(_gradients, function))(x, kernel), _gradients(expected, x, kernel))


# No more pixels, over the batch, than outputs.
SMALL = [
    ((2, 4, 3, 5), 3, 24, 1, ((1, 1), (1, 1))),
    ((1, 5, 4, 2), 2, 20, 1, ((1, 0), (0, 1))),
    ((2, 8, 6, 3), 3, 24, 2, ((0, 1), (1, 1))),
    ((1, 9, 7, 3), 4, 20, 2, ((1, 1), (1, 1))),
]


@pytest.mark.parametrize("case", SMALL)
def test_a_small_map_is_one_product_and_equals_the_compilers_and_torch(case, monkeypatch):
    shape, size, outputs, stride, padding = case
    monkeypatch.setattr(convolution, "MIN_MATRIX_BYTES", 2**40)
    x, kernel = _arrays(shape, size, outputs)
    function = partial(convolve, stride=stride, padding=padding)
    expected = partial(convolution._convolve, stride=stride, padding=padding)
    y, *gradients = jax.jit(partial(_gradients, function))(x, kernel)
    _close((y, *gradients), _gradients(expected, x, kernel))
    (left, right), (above, below) = padding[1], padding[0]
    padded = torch.nn.functional.pad(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), (left, right, above, below))
    at_torch = torch.nn.functional.conv2d(padded, torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1), stride=stride)
    _close([y], [at_torch.permute(0, 2, 3, 1)])
    lowered = jax.jit(function).lower(x, kernel).as_text()
    assert "stablehlo.dot_general" in lowered
    assert "stablehlo.convolution" not in lowered
    assert "stablehlo.convolution" in jax.jit(function).lower(jnp.concatenate([x] * 4), kernel).as_text()
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(x, kernel)
    assert "stablehlo.convolution" in exported.mlir_module()


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    shape, size, outputs, stride, (rows, columns) = case
    x, kernel = _arrays(shape, size, outputs)
    y, *ours = _gradients(partial(convolve, stride=stride, padding=(rows, columns)), x, kernel)
    weights = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)

    a = torch.tensor(np.asarray(x)).requires_grad_()
    w = torch.tensor(np.asarray(kernel)).requires_grad_()
    padded = torch.nn.functional.pad(a.permute(0, 3, 1, 2), (*columns, *rows))
    z = torch.nn.functional.conv2d(padded, w.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)
    z.backward(torch.tensor(weights))
    _close([y, *ours], [z.detach(), a.grad, w.grad])


def test_recomputed_in_the_backward_pass():
    x, kernel = _arrays((2, 8, 8, 4), 3, 4)
    function = partial(convolve, stride=1, padding=((1, 1), (1, 1)))

    def twice(x, kernel):
        return function(jnp.sin(function(x, kernel)), kernel)

    _close(jax.jit(partial(_gradients, jax.checkpoint(twice)))(x, kernel), _gradients(twice, x, kernel))


def test_bfloat16_is_summed_in_float32():
    x, kernel = _arrays((1, 32, 32, 4), 3, 4, "bfloat16")
    function = partial(convolve, stride=1, padding=((1, 1), (1, 1)))
    y, *ours = _gradients(function, x, kernel)
    assert {g.dtype for g in (y, *ours)} == {jnp.dtype("bfloat16")}
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), "bfloat16")
    _, pull = jax.vjp(function, x.astype("float32"), kernel.astype("float32"))
    _close(ours, pull(weights.astype("float32")), 2**-8)


def test_on_a_mesh_of_several_devices_the_compilers_own():
    x, kernel = _arrays((8, 8, 8, 4), 3, 4)
    function = partial(_gradients, partial(convolve, stride=1, padding=((1, 1), (1, 1))))
    expected = jax.jit(function)(x, kernel)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        traced = jax.jit(function).trace(x, kernel)
        _close(jax.jit(function)(x, kernel), expected)
    assert "platform_index" not in str(traced.jaxpr)


def test_other_platforms_take_the_compilers_own():
    x, kernel = _arrays((2, 8, 8, 4), 3, 4)
    function = jax.jit(partial(_gradients, partial(convolve, stride=1, padding=((1, 1), (1, 1)))))
    programs = {
        platform: jax.export.export(function, platforms=[platform])(x, kernel).mlir_module()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert "stablehlo.while" in programs["cpu"]
    # That of the input's gradient.
    assert programs["cpu"].count("stablehlo.convolution") == 1
    for platform in ("tpu", "cuda"):
        assert "stablehlo.while" not in programs[platform]
        assert programs[platform].count("stablehlo.convolution") == 3


def test_plans_count_what_the_compilers_own_takes(monkeypatch):
    x, kernel = _arrays((2, 8, 8, 4), 3, 4)
    function = partial(convolve, stride=1, padding=((1, 1), (1, 1)))
    ours = matmul_flops(jax.make_jaxpr(partial(_gradients, function))(x, kernel).jaxpr)
    monkeypatch.setattr(convolution, "MIN_MATRIX_BYTES", 2**60)
    # Through another function, as traces are kept by function.
    assert ours == matmul_flops(jax.make_jaxpr(lambda x, w: _gradients(partial(function), x, w))(x, kernel).jaxpr)
