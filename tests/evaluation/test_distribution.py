"""Inception's features against the network in torch, the scores against their formulas, and the command line."""

import json

import jax
import numpy as np
import pytest
import torch
from oracles import TorchInception, relative_error
from scipy.linalg import sqrtm

from asymvq_jax.commands.score import main
from asymvq_jax.config import MeshConfig
from asymvq_jax.devices import sharding
from asymvq_jax.errors import DistributionError, InceptionError
from asymvq_jax.evaluation.metrics.distribution import (
    Extractor,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_statistics,
    save_statistics,
    statistics,
)
from asymvq_jax.evaluation.metrics.inception import load_inception
from asymvq_jax.files import images


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return TorchInception().randomized().eval()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(theirs.state_dict(), path)
    return path


def _pictures(count=3):
    rng = np.random.default_rng(0)
    sizes = [(37, 51), (299, 299), (401, 333), (64, 64)]
    return [rng.integers(0, 256, (*sizes[i % 4], 3), dtype=np.uint8) for i in range(count)]


def test_features_are_the_torch_network_s_on_one_device_and_on_eight(theirs, weights):
    params, pictures = load_inception(weights), _pictures()
    with torch.no_grad():
        results = [theirs(torch.from_numpy(x).permute(2, 0, 1)[None]) for x in pictures]
    pool, logits = (torch.cat(values).numpy() for values in zip(*results, strict=True))
    # The pictures differ in them, or any picture would do.
    assert np.ptp(pool, axis=0).max() > 0.01 * np.ptp(pool)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for mesh, batch in ((one, 2), (None, 8)):
        extractor = Extractor(params, batch, mesh)
        extractor.add_all(pictures)
        features = extractor.features()
        assert relative_error(features.pool, pool) <= 1e-5
        assert relative_error(features.logits, logits) <= 1e-5


def _features(seed, count, dimensions=16):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + seed).astype(np.float32)


def test_frechet_distance_is_its_formula():
    a, b = _features(0, 40), _features(1, 50)
    mean, covariance = a.mean(0, dtype=np.float64), np.cov(a, rowvar=False)
    other, other_covariance = b.mean(0, dtype=np.float64), np.cov(b, rowvar=False)
    root = sqrtm(covariance @ other_covariance).real
    expected = np.square(mean - other).sum() + np.trace(covariance + other_covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(statistics(a), statistics(b)), expected, rtol=1e-6)
    assert abs(frechet_distance(statistics(a), statistics(a))) < 1e-6 * np.trace(covariance)
    # Fewer pictures than dimensions: the covariances are singular.
    few = frechet_distance(statistics(a[:5]), statistics(b[:6]))
    assert np.isfinite(few)
    assert few > 0


def test_kernel_distance_is_its_formula():
    a, b = _features(0, 12).astype(np.float64), _features(1, 12).astype(np.float64)

    def kernel(x, y):
        return (x @ y / 16 + 1) ** 3

    within = [[kernel(x[i], x[j]) for i in range(12) for j in range(12) if i != j] for x in (a, b)]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within[0]) + np.mean(within[1]) - 2 * np.mean(across)
    # A subset as large as the set holds all of it, whatever the order.
    mean, deviation = kernel_distance(a, b, subset=12)
    np.testing.assert_allclose(mean, expected)
    assert deviation < 1e-9 * abs(mean)
    assert kernel_distance(a, b, subset=6)[1] > 0
    with pytest.raises(DistributionError, match=r"subsets of 13 pictures, and there are 12 and 12.*--kid-subset"):
        kernel_distance(a, b, subset=13)


def test_inception_score_is_its_formula():
    certain = np.full((100, 10), -50.0, np.float32)
    certain[np.arange(100), np.arange(100) % 10] = 50
    # Each of ten parts has some ten of ten classes, every one of them certain.
    mean, _ = inception_score(certain)
    assert 5 < mean <= 10
    np.testing.assert_allclose(inception_score(np.zeros((30, 10), np.float32)), (1, 0), atol=1e-12)
    order = np.random.RandomState(2020).permutation(30)
    logits = 3 * _features(2, 30)
    p = torch.softmax(torch.from_numpy(logits[order]).double(), 1).reshape(10, 3, 16)
    scores = (p * (p.log() - p.mean(1, keepdim=True).log())).sum(2).mean(1).exp().numpy()
    np.testing.assert_allclose(inception_score(logits), (scores.mean(), scores.std()), rtol=1e-6)
    with pytest.raises(DistributionError, match="needs 10 pictures or more, and there are 9"):
        inception_score(logits[:9])


def test_statistics_on_disk(tmp_path):
    pool = _features(0, 20)
    save_statistics(str(tmp_path / "ours.npz"), pool)
    read, features = load_statistics(str(tmp_path / "ours.npz"))
    np.testing.assert_array_equal(read.covariance, statistics(pool).covariance)
    np.testing.assert_array_equal(features, pool)
    np.savez(tmp_path / "theirs.npz", mu=read.mean, sigma=read.covariance)
    assert load_statistics(str(tmp_path / "theirs.npz"))[1] is None
    np.savez(tmp_path / "other.npz", mu=read.mean)
    with pytest.raises(DistributionError, match=r"other.npz: expected the arrays mu \(d,\) and sigma \(d, d\)"):
        load_statistics(str(tmp_path / "other.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    with pytest.raises(DistributionError, match=r"broken.npz is not a readable .npz file"):
        load_statistics(str(tmp_path / "broken.npz"))


def test_another_network_s_weights_are_refused(theirs, tmp_path):
    tensors = theirs.state_dict()
    del tensors["Mixed_6c.branch7x7_2.conv.weight"]
    tensors["fc.weight"] = tensors["fc.weight"][:1000]
    tensors["features.0.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(InceptionError) as error:
        load_inception(tmp_path / "bad.pth")
    for part in ("missing: Mixed_6c.branch7x7_2.conv.weight (160, 160, 1, 7)", "unexpected: features.0.weight (3,)",
                 "misshapen: fc.weight (1000, 2048), expected (1008, 2048)"):  # fmt: skip
        assert part in str(error.value)


def test_command_line(weights, tmp_path, capsys):
    for name, shift in (("a", 0), ("b", 40)):
        for i, picture in enumerate(_pictures(10)):
            images.write(tmp_path / name / f"{i}.png", np.clip(picture.astype(int) + shift, 0, 255).astype(np.uint8))
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), f"--inception={weights}", "--batch=16"]
    assert (
        main([*arguments, "--kid-subset=5", f"--save-statistics={tmp_path / 'b.npz'}", f"--json={tmp_path / 't.json'}"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "10 pictures against 10 pictures" in printed
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["fid"] > 0
    assert load_statistics(str(tmp_path / "b.npz"))[1].shape == (10, 2048)
    for bad, message in (
        ([str(tmp_path / "none"), *arguments[1:]], "--images="),
        ([arguments[0], str(tmp_path / "none"), *arguments[2:]], "--reference="),
        ([*arguments[:2], f"--inception={tmp_path / 'none.pth'}"], "no weights file at"),
        ([*arguments, "--json=t.txt"], "t.txt"),
    ):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
