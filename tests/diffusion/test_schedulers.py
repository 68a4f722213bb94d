"""Whole trajectories of the samplers against diffusers' schedulers, in float32."""

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from asymvq_jax.diffusion.schedulers import CLASSES, Solver, advance, begin, make_solver, read_config
from asymvq_jax.errors import SchedulerError

# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
OWN = {"PNDMScheduler": {"skip_prk_steps": True}, "DDIMScheduler": {"clip_sample": False}}
SHAPE = (2, 3, 5, 4)
NAMES = {kind: name for name, kind in CLASSES.items()}


def network(x, t, numpy):
    """Anything that is not linear in the sample and depends on the time; of about unit size, as a network's output."""
    return numpy.tanh(1.3 * x + 0.2) + 0.3 * numpy.sin(3 * x + t / 100.0)


def ours(stored, steps, noise, kind=None):
    solver = make_solver(read_config(stored, "scheduler_config.json", kind), steps)

    def step(history, row):
        history = advance(row, history, network(history.samples[0], row.timesteps.astype(jnp.float32), jnp))
        return history, history.samples[0]

    _, trajectory = jax.jit(lambda noise: jax.lax.scan(step, begin(solver, noise), Solver(*map(jnp.asarray, solver))))(
        noise
    )
    return np.asarray(trajectory)


def theirs(scheduler, steps, noise):
    scheduler.set_timesteps(steps)
    sample, trajectory = torch.from_numpy(noise), []
    for t in scheduler.timesteps:
        sample = scheduler.step(network(sample, t.float(), torch), t, sample).prev_sample
        trajectory.append(sample.numpy())
    return np.stack(trajectory)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["ddim", "pndm", "dpm++"])
def test_trajectory(kind, prediction, spacing, steps):
    name = NAMES[kind]
    settings = STABLE_DIFFUSION | OWN.get(name, {}) | {"prediction_type": prediction, "timestep_spacing": spacing}
    noise = np.random.default_rng(steps).normal(size=SHAPE).astype(np.float32)
    expected = theirs(getattr(diffusers, name)(**settings), steps, noise)
    result = ours({"_class_name": name, **settings}, steps, noise)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}),
        ("DDIMScheduler", {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        ),
        ("PNDMScheduler", {"set_alpha_to_one": True}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ],
)
@pytest.mark.parametrize("steps", [6, 25])
def test_options(name, changes, steps):
    settings = STABLE_DIFFUSION | OWN.get(name, {}) | changes
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = theirs(getattr(diffusers, name)(**settings), steps, noise)
    result = ours({"_class_name": name, **settings}, steps, noise)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("kind", ["ddim", "dpm++"])
def test_another_sampler_on_the_same_noise_schedule(kind):
    """As diffusers' from_config does it with Stable Diffusion 1's own file, which names PNDM."""
    stored = {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION, "set_alpha_to_one": False, "clip_sample": False}
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = theirs(getattr(diffusers, NAMES[kind]).from_config(stored), 12, noise)
    np.testing.assert_allclose(ours(stored, 12, noise, kind), expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "_class_name is 'EulerDiscreteScheduler'; there are DDIMScheduler"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample=True (there is False)"),
        (
            {"_class_name": "PNDMScheduler"},
            "skip_prk_steps=False (there is True); --scheduler ddim or --scheduler dpm++ runs",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "sample"},
            "prediction_type='sample' (there is",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"}, "scaled_linear"),
        ({"_class_name": "DPMSolverMultistepScheduler", "rescale_betas_zero_snr": True}, "needs prediction_type"),
    ],
)
def test_what_we_do_not_have(stored, message):
    with pytest.raises(SchedulerError, match=re.escape(message)) as error:
        read_config(stored, "pipeline/scheduler/scheduler_config.json")
    assert "pipeline/scheduler/scheduler_config.json" in str(error.value)


def test_a_spacing_that_another_class_stored_is_not_dropped():
    """diffusers' from_config keeps it for the sampler that knows it; the others never had it."""
    stored = {
        "_class_name": "EulerDiscreteScheduler",
        **STABLE_DIFFUSION,
        "use_karras_sigmas": True,
        "clip_sample": False,
    }
    with pytest.raises(SchedulerError, match=r"use_karras_sigmas=True .*--scheduler ddim or --scheduler pndm runs"):
        read_config(stored, "file", "dpm++")
    for kind in ("ddim", "pndm"):
        read_config(stored, "file", kind)
    read_config(stored | {"use_karras_sigmas": False}, "file", "dpm++")


@pytest.mark.parametrize("steps", [0, 1001])
def test_number_of_steps(steps):
    with pytest.raises(SchedulerError, match="expected 1 to 99"):
        make_solver(read_config({"_class_name": "DPMSolverMultistepScheduler"}, "file"), steps)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}, "steps_offset=1"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "for 1000 timesteps"),
        (
            {
                "_class_name": "PNDMScheduler",
                "skip_prk_steps": True,
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            "pndm cannot start from pure noise",
        ),
    ],
)
def test_tables_that_do_not_exist(stored, message):
    with pytest.raises(SchedulerError, match=re.escape(message)):
        make_solver(read_config(stored, "file"), 1000)


def test_trained_betas_matter_to_every_sampler():
    stored = {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1, 0.2]}
    with pytest.raises(SchedulerError, match="trained_betas"):
        read_config(stored, "file", "ddim")
