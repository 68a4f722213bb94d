"""Whole trajectories of the samplers against diffusers' schedulers, in float32."""

import importlib
import itertools
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from asymvq_jax.diffusion.schedulers import KARRAS_SAMPLERS, SAMPLERS, read_config
from asymvq_jax.diffusion.solvers import advance, begin, make_solver
from asymvq_jax.errors import SchedulerError

# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
OWN = {"pndm": {"skip_prk_steps": True}, "ddim": {"clip_sample": False}, "ddpm": {"clip_sample": False}}
SHAPE = (2, 3, 5, 4)
STOCHASTIC = {"euler-ancestral": "euler_ancestral_discrete", "ddpm": "ddpm", "lcm": "lcm"}


def normal(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def network(x, t, numpy):
    """Anything that is not linear in the sample and depends on the time; of about unit size, as a network's output."""
    return numpy.tanh(1.3 * x + 0.2) + 0.3 * numpy.sin(3 * x + t / 100.0)


@jax.jit
def step(row, history, noise):
    return advance(row, history, network(history.samples[0], row.timesteps, jnp), noise)


def ours(stored, steps, kind=None, strength=1.0, image=None):
    """What the network is given at each step, and the result."""
    solver = make_solver(read_config(stored, "scheduler_config.json", kind), steps, strength)
    history, trajectory = begin(solver, normal(0), image), []
    for i in range(len(solver.rows.timesteps)):
        trajectory.append(history.samples[0])
        history = step(jax.tree.map(lambda x, i=i: x[i], solver.rows), history, normal(1 + i))
    return np.stack([*trajectory, history.samples[0]])


def theirs(scheduler, steps, monkeypatch, kind, begin_at=0, image=None):
    if kind in STOCHASTIC:
        module, drawn = (
            importlib.import_module(f"diffusers.schedulers.scheduling_{STOCHASTIC[kind]}"),
            itertools.count(1),
        )
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(normal(next(drawn))))
    scheduler.set_timesteps(steps)
    timesteps, trajectory = scheduler.timesteps[begin_at * scheduler.order :], []
    noise = torch.from_numpy(normal(0))
    if image is None:
        sample = noise * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin_at * scheduler.order)
        sample = scheduler.add_noise(torch.from_numpy(image), noise, timesteps[:1])
    for t in timesteps:
        x = scheduler.scale_model_input(sample, t)
        trajectory.append(x.numpy())
        sample = scheduler.step(network(x, t.float(), torch), t, sample).prev_sample
    return np.stack([*trajectory, sample.numpy()])


def assert_same(kind, settings, steps, monkeypatch, tolerance=1e-5):
    name = SAMPLERS[kind].name
    settings = STABLE_DIFFUSION | OWN.get(kind, {}) | settings
    expected = theirs(getattr(diffusers, name)(**settings), steps, monkeypatch, kind)
    result = ours({"_class_name": name, **settings}, steps)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.ptp(expected))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_trajectory(kind, prediction, spacing, monkeypatch):
    for steps in (1, 2, 7, 30):
        assert_same(kind, {"prediction_type": prediction, "timestep_spacing": spacing}, steps, monkeypatch)


ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ddim", {"set_alpha_to_one": False}),
        ("ddim", {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        ("ddim", ZERO),
        ("ddpm", ZERO),
        ("euler", ZERO),
        ("euler-ancestral", ZERO),
        ("lcm", ZERO),
        ("unipc", ZERO),
        ("dpm++", ZERO),
        ("pndm", {"set_alpha_to_one": True}),
        ("dpm++", {"final_sigmas_type": "sigma_min"}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpm++", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
    ],
)
def test_options(kind, changes, monkeypatch):
    # diffusers' samples have a standard deviation of 4096 there, in float32.
    large = changes == ZERO and kind.startswith("euler")
    for steps in (6, 25):
        assert_same(kind, changes, steps, monkeypatch, 3e-5 if large else 1e-5)


@pytest.mark.parametrize("kind", KARRAS_SAMPLERS)
def test_karras(kind, monkeypatch):
    for spacing, prediction in (("leading", "epsilon"), ("trailing", "v_prediction")):
        changes = {"timestep_spacing": spacing, "prediction_type": prediction, "use_karras_sigmas": True}
        for steps in (6, 25):
            assert_same(kind, changes, steps, monkeypatch)


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind != "pndm"])
def test_from_a_known_image(kind, monkeypatch):
    """`strength`: the last steps, from the image with noise on it. PNDM's start has no such steps in diffusers."""
    settings = STABLE_DIFFUSION | OWN.get(kind, {})
    image = 0.7 * normal(9)
    scheduler = getattr(diffusers, SAMPLERS[kind].name)(**settings)
    expected = theirs(scheduler, 10, monkeypatch, kind, begin_at=4, image=image)
    result = ours({"_class_name": SAMPLERS[kind].name, **settings}, 10, strength=0.6, image=image)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_pndm_from_a_known_image_starts_as_from_noise():
    """diffusers' begins in the middle of its start's bookkeeping, and then is one step behind."""
    stored = {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION, **OWN["pndm"]}
    whole, part = (make_solver(read_config(stored, "file"), 10, strength).rows for strength in (1.0, 0.6))
    assert part.timesteps.tolist() == [501, 401, 401, 301, 201, 101, 1]
    np.testing.assert_array_equal(part.outputs[0], [part.outputs[0, 0], 0, 0, 0, 0])
    np.testing.assert_array_equal(part.levels[2:], whole.levels[6:])


@pytest.mark.parametrize("kind", [kind for kind in SAMPLERS if kind != "pndm"])
def test_another_sampler_on_the_same_noise_schedule(kind, monkeypatch):
    """As diffusers' from_config does it with Stable Diffusion 1's own file, which names PNDM."""
    stored = {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION, "set_alpha_to_one": False, "clip_sample": False}
    expected = theirs(getattr(diffusers, SAMPLERS[kind].name).from_config(stored), 12, monkeypatch, kind)
    np.testing.assert_allclose(ours(stored, 12, kind), expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"_class_name": "KDPM2DiscreteScheduler"}, "_class_name is 'KDPM2DiscreteScheduler'; there are DDIMScheduler"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample=True (there is False)"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned"}, "variance_type='learned'"),
        (
            {"_class_name": "PNDMScheduler"},
            "skip_prk_steps=False (there is True); on the same noise schedule there is --scheduler ddim|dpm++|euler",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type="),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "solver_order=3 (there is 2)"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type="),
        ({"_class_name": "HeunDiscreteScheduler", "use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "sample"},
            "prediction_type='sample' (there is",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"}, "scaled_linear"),
        ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, "needs prediction_type"),
        (
            {"_class_name": "HeunDiscreteScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "which Heun does not have",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
            "two steps in one place",
        ),
        ({"_class_name": "LCMScheduler", "trained_betas": [0.1, 0.2]}, "trained_betas=[0.1, 0.2]"),
    ],
)
def test_what_we_do_not_have(stored, message):
    with pytest.raises(SchedulerError, match=re.escape(message)) as error:
        read_config(stored, "pipeline/scheduler/scheduler_config.json")
    assert "pipeline/scheduler/scheduler_config.json" in str(error.value)


def test_a_spacing_that_another_class_stored_is_not_dropped(caplog):
    """diffusers' from_config keeps it for the sampler that knows it; the others never had it, and say so."""
    stored = {"_class_name": "EulerDiscreteScheduler", **STABLE_DIFFUSION, "use_karras_sigmas": True}
    assert read_config(stored, "file", "dpm++").use_karras_sigmas
    assert not read_config(stored, "file", "ddpm").use_karras_sigmas
    assert "file: use_karras_sigmas has no effect on ddpm, as in diffusers" in caplog.text
    stored |= {"use_karras_sigmas": None, "use_beta_sigmas": True}
    with pytest.raises(SchedulerError, match=r"use_beta_sigmas=True .*--scheduler ddim\|pndm\|euler-ancestral\|ddpm"):
        read_config(stored, "file", "dpm++")


@pytest.mark.parametrize("steps", [0, 1001])
def test_number_of_steps(steps):
    with pytest.raises(SchedulerError, match="expected 1 to 99"):
        make_solver(read_config({"_class_name": "DPMSolverMultistepScheduler"}, "file"), steps)
    with pytest.raises(SchedulerError, match=r"expected 1 to 50, .* with original_inference_steps=50"):
        make_solver(read_config({"_class_name": "LCMScheduler"}, "file"), steps)


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.1])
def test_strength(strength):
    with pytest.raises(SchedulerError, match=rf"strength={strength:g}: expected more than 0\.2, one of 5 steps, to 1"):
        make_solver(read_config({"_class_name": "LCMScheduler"}, "file"), 5, strength)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}, "steps_offset=1"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "for 1000 timesteps"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, **ZERO}, "pndm has no such steps"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False, "timestep_spacing": "trailing"},
         "lower_order_final=False; choose another"),
    ],
)  # fmt: skip
def test_tables_that_do_not_exist(stored, message):
    with pytest.raises(SchedulerError, match=re.escape(message)):
        make_solver(read_config(stored, "file"), 1000)


def test_trained_betas_matter_to_every_sampler():
    stored = {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1, 0.2]}
    with pytest.raises(SchedulerError, match="trained_betas"):
        read_config(stored, "file", "ddim")
