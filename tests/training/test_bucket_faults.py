"""Runs in a bucket whose service ends, is slow, or refuses: they go on, or end with one line and whole checkpoints."""

import dataclasses
import functools
import itertools
import threading

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from asymvq_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RunConfig
from asymvq_jax.devices.waiting import Watch
from asymvq_jax.errors import CheckpointError, ExitCode, OutputError, UnansweredError, exit_code
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import find_step, load_parameters, save_model
from asymvq_jax.training import loop
from asymvq_jax.training.loop import train

MODEL = ModelConfig(
    encoder_channels=(8, 8), decoder_channels=(8, 8), encoder_blocks=1, decoder_blocks=1, norm_groups=4,
    mid_attention=False,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _config(name: str, **changes) -> Config:
    run = {"directory": f"gs://bucket/faults/{name}", "init_from": "gs://bucket/faults/first", "steps": 3}
    run |= {"log_every": 1, "eval_every": 1, "eval_pictures": 8, "keep": 3}
    return Config(
        run=RunConfig(**(run | changes)),
        model=MODEL,
        # A discriminator that never starts is saved all the same.
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=1, discriminator_layers=1),
        data=DataConfig(image_size=16, batch_size=8),
        optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, schedule="constant"),
    )


@pytest.fixture(scope="module")
def undisturbed(storage, shared_programs):
    """The parameters after three steps, of a run that nothing happens to."""
    storage.forget()
    save_model("gs://bucket/faults/first", Autoencoder(dataclasses.replace(MODEL, condition=False), rngs=nnx.Rngs(0)))
    with jax.numpy_dtype_promotion("standard"):
        assert train(_config("undisturbed")) == ExitCode.DONE
    return load_parameters("gs://bucket/faults/undisturbed")[1]


@pytest.fixture
def service(storage, undisturbed):
    storage.forget()
    yield storage
    storage.forget()


def _equal(name: str, expected) -> None:
    _, parameters = load_parameters(f"gs://bucket/faults/{name}")
    for path, value in expected.items():
        np.testing.assert_array_equal(parameters[path], value, err_msg=path)


def test_a_service_that_ends_and_starts_again_in_mid_save_is_waited_for(service, undisturbed):
    begun = threading.Event()

    def fault(method: str, path: str) -> None:
        if method == "POST" and "killed%2Fcheckpoints%2F2%2Fmodel" in path.replace("/", "%2F") and not begun.is_set():
            begun.set()
            service.kill()
            threading.Timer(1.0, service.start).start()

    service.fault = fault
    assert train(_config("killed")) == ExitCode.DONE
    assert begun.is_set()
    _equal("killed", undisturbed)


def test_a_service_that_does_not_come_back_is_waited_for_until_the_limit(service, undisturbed, monkeypatch):
    left = []

    def leave(code: int) -> None:
        # In the place of the process's end: the service is back, so that the run can end.
        if not left:
            service.start()
        left.append(code)

    def fault(method: str, path: str) -> None:
        if method == "POST" and "gone%2Fcheckpoints%2F2%2Fmodel" in path.replace("/", "%2F") and not killed:
            killed.append(path)
            service.kill()

    killed = []
    monkeypatch.setattr(loop, "Watch", functools.partial(Watch, leave=leave))
    service.fault = fault
    try:
        train(_config("gone", wait_limit=10.0))
    except UnansweredError as error:
        # The checkpoint's own limit was the first.
        left.append(exit_code(error))
    assert killed
    assert left[0] == ExitCode.LOST_PEER
    if len(left) == 1:
        service.kill()
        service.start()
    assert find_step("gs://bucket/faults/gone").name in ("1", "2", "3")
    load_parameters("gs://bucket/faults/gone")


def test_a_slow_service_that_often_refuses_is_asked_again(service, undisturbed):
    requests = itertools.count()
    service.delay = 0.01
    service.fault = lambda method, path: 503 if next(requests) % 15 == 7 else None
    assert train(_config("slow", steps=1)) == ExitCode.DONE
    service.forget()
    assert train(_config("slow")) == ExitCode.DONE
    _equal("slow", undisturbed)


def test_a_permission_that_is_lost_ends_the_run_and_leaves_the_checkpoints(service, undisturbed):
    def fault(method: str, path: str) -> int | None:
        return 403 if method in ("POST", "PUT") and "checkpoints%2F2" in path.replace("/", "%2F") else None

    service.fault = fault
    with pytest.raises((CheckpointError, OutputError)) as error:
        train(_config("refused"))
    assert "a checkpoint cannot be written: " in str(error.value)
    assert "403" in str(error.value) or "Forbidden" in str(error.value) or "PERMISSION_DENIED" in str(error.value)
    assert find_step("gs://bucket/faults/refused").name == "1"
    load_parameters("gs://bucket/faults/refused")
    # What was begun is no checkpoint, and is in nobody's way.
    service.forget()
    (epath.Path("gs://bucket/faults/refused/checkpoints/2") / "part").write_bytes(b"")
    assert train(_config("refused")) == ExitCode.DONE
    _equal("refused", undisturbed)
