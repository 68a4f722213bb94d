"""Pictures larger than one device's memory: in strips of rows on one device, and height-sharded over several."""

import jax
import numpy as np
import pytest
from flax import nnx
from oracles import TINY, relative_error

from asymvq_jax import inference
from asymvq_jax.commands import inpaint
from asymvq_jax.devices import sharding
from asymvq_jax.files import images
from asymvq_jax.inference.strips import decode_in_strips, encode_in_strips
from asymvq_jax.models import blocks
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from asymvq_jax.plan.counting import collectives


@pytest.fixture(scope="module")
def model():
    return Autoencoder(TINY, rngs=nnx.Rngs(0))


def _inputs(height: int, width: int):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, height // 8, width // 8, 4)).astype(np.float32)
    # The picture's contrast differs from top to bottom, so that a strip's own statistics would be wrong ones.
    image = rng.uniform(-1, 1, (2, height, width, 3)) * np.linspace(0.1, 1, height)[None, :, None, None]
    mask = rng.uniform(size=(2, height, width, 1)) > 0.5
    return z, image.astype(np.float32), mask.astype(np.float32)


@pytest.mark.parametrize("condition", [True, False])
def test_strips_equal_the_whole(model, condition):
    z, image, mask = _inputs(40, 24)
    given = (z, image, mask) if condition else (z,)
    # Strips of 6 rows at full resolution (the last one of 4), and of 2 where the minimum holds.
    result = decode_in_strips(model, *given, strip_pixels=6 * 24)
    assert result.dtype == np.float32
    assert relative_error(result, nnx.jit(lambda m, *a: m.decode(*a))(model, *given)) <= 1e-5


def test_strips_take_any_size_and_encode(model):
    _, image, mask = _inputs(45, 27)
    latent = inference.encode(model, image)
    assert relative_error(encode_in_strips(model, image, strip_pixels=6 * 24), latent) <= 1e-5
    result = decode_in_strips(model, latent, image, mask, strip_pixels=6 * 24)
    assert relative_error(result, inference.decode(model, latent, image, mask)) <= 1e-5


@pytest.mark.parametrize("large", ["strips", "devices"])
def test_the_command_line_for_large_pictures(model, large, tmp_path, capsys):
    save_model(tmp_path / "model", model)
    rng = np.random.default_rng(0)
    images.write(str(tmp_path / "image.png"), rng.integers(0, 256, (48, 40, 3)).astype(np.uint8))
    images.write(str(tmp_path / "mask.png"), np.repeat(rng.integers(0, 2, (48, 40, 1)) * 255, 3, 2).astype(np.uint8))
    files = [f"--{name}={tmp_path / name}.png" for name in ("image", "mask")]
    for name, options in (("whole", []), ("parts", [f"--large={large}"])):
        out = f"--out={tmp_path / name}.png"
        assert inpaint.main([*files, f"--checkpoint={tmp_path / 'model'}", out, *options]) == 0, capsys.readouterr().err
    whole, parts = (images.read(str(tmp_path / f"{name}.png")).astype(int) for name in ("whole", "parts"))
    assert np.abs(whole - parts).max() <= 1


def test_rows_over_devices_equal_one_device(model):
    z, image, mask = _inputs(64, 40)
    mesh = sharding.make_height_mesh(jax.devices()[:4])
    latent = inference.encode(model, image, mesh=mesh)
    assert relative_error(latent, inference.encode(model, image)) <= 1e-5
    result = inference.decode(inference.place(model, mesh), z, image, mask, mesh=mesh)
    assert result.sharding.shard_shape(result.shape) == (2, 16, 40, 3)
    assert relative_error(result, inference.decode(model, z, image, mask)) <= 1e-5


@pytest.mark.parametrize("chunks", [1, 5])
def test_rows_travel_between_neighbours_and_pictures_do_not(model, monkeypatch, chunks):
    """The program for eight devices exchanges borders; it gathers the attention's keys and values, once, and no more.

    So it does where the queries are taken in chunks, as those of large pictures are.
    """
    z, image, mask = _inputs(64, 40)
    mesh = sharding.make_height_mesh()
    rows = sharding.height_sharding(mesh)
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for x in (z, image, mask)]
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * len(z) * (8 * 5) ** 2 // mesh.size // chunks)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *a: model.decode(*a)).lower(*given).compile()
    moved = {c.kind: c for c in collectives(compiled.as_text(), mesh.shape)}
    assert set(moved) == {"collective-permute", "all-gather", "all-reduce"}
    latent = z.size // z.shape[-1] * model.config.decoder_channels[-1] * 4
    assert moved["all-gather"].count <= 2
    assert moved["all-gather"].bytes <= 2 * latent
    # The sums of the group normalisations, and no attention scores.
    norms = sum(isinstance(module, blocks.GroupNorm) for _, module in nnx.iter_modules(model.decoder))
    assert moved["all-reduce"].count <= norms
    result = compiled(*jax.device_put((z, image, mask), rows))
    assert relative_error(result, inference.decode(model, z, image, mask)) <= 1e-5


def test_rows_that_cannot_be_split_are_named(model):
    z, image, mask = _inputs(40, 24)
    mesh = sharding.make_height_mesh(jax.devices()[:4])
    with pytest.raises(inference.InputError, match="the latent has 5 rows, which 4 devices cannot split evenly"):
        inference.decode(model, z, image, mask, mesh=mesh)
    with pytest.raises(inference.InputError, match="the latent has 5 rows"):
        inference.encode(model, image, mesh=mesh)
