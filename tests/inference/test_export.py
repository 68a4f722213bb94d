"""The exported decoder: a file that a process without this package runs, and its messages."""

import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from oracles import TINY

from asymvq_jax.commands.export import main
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model

# `-I` keeps this folder off the path, so that the package cannot be imported by accident.
SERVER = """
import sys
import numpy as np
from jax import export
decode = export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
given = np.load(sys.argv[2])
np.save(sys.argv[3], decode(given["z"], given["image"], given["mask"]))
assert not any(name.startswith(("asymvq_jax", "flax")) for name in sys.modules)
"""


@pytest.fixture(scope="module")
def model():
    return Autoencoder(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    save_model(path, model)
    return str(path)


def test_a_process_without_the_package_decodes_the_same(model, checkpoint, tmp_path):
    assert main([checkpoint, str(tmp_path / "decoder.jax"), "--size=16x24", "--batch=2"]) == 0
    rng = np.random.default_rng(0)
    given = {
        "z": rng.normal(size=(2, 2, 3, 4)).astype(np.float32),
        "image": rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32),
        "mask": (rng.uniform(size=(2, 16, 24, 1)) > 0.5).astype(np.float32),
    }
    np.savez(tmp_path / "given.npz", **given)
    paths = [str(tmp_path / name) for name in ("decoder.jax", "given.npz", "result.npy")]
    subprocess.run([sys.executable, "-I", "-c", SERVER, *paths], check=True, cwd=tmp_path)
    expected = model.decode(given["z"], given["image"], given["mask"])
    np.testing.assert_allclose(np.load(tmp_path / "result.npy"), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--size=20x24"], "1 of 20 x 24 px: expected at least 1, of sides that are multiples of 8"),
        (["--size=big"], "--size big: expected HEIGHTxWIDTH"),
        (["--batch=0"], "batch 0 of"),
    ],
)
def test_messages(checkpoint, tmp_path, capsys, changes, message):
    assert main([checkpoint, str(tmp_path / "decoder.jax"), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "decoder.jax").exists()
