"""Samplers and the noise schedules of their models, as diffusers' scheduler_config.json has them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from asymvq_jax.errors import SchedulerError

log = logging.getLogger(__name__)

Kind = Literal["ddim", "pndm", "dpm++", "euler", "euler-ancestral", "heun", "unipc", "ddpm", "lcm"]


class Sampler(NamedTuple):
    """diffusers' class of a sampler."""

    name: str
    # The values of our fields that its configuration has where it says nothing, where these are not our defaults.
    defaults: dict[str, Any]
    # Of its options, those that change what is computed and that we do not have, with the value that we have.
    expected: dict[str, Any]


# Other places of the steps than those of `timestep_spacing`. They matter to a sampler that knows them, of any class.
KARRAS = "use_karras_sigmas"
SPACINGS = (KARRAS, "use_exponential_sigmas", "use_beta_sigmas")
_OTHER_SPACINGS = dict.fromkeys(SPACINGS[1:], False)
_FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
SAMPLERS: dict[Kind, Sampler] = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": True}, {"clip_sample": False, "thresholding": False}),
    "pndm": Sampler(
        "PNDMScheduler", {"set_alpha_to_one": False, "skip_prk_steps": False}, {"skip_prk_steps": True}
    ),
    "dpm++": Sampler(
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "linspace"},
        {
            "thresholding": False,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lambda_min_clipped": -np.inf,
            "use_lu_lambdas": False,
            "variance_type": None,
            **_FLOW,
            **_OTHER_SPACINGS,
        },
    ),
    "euler": Sampler(
        "EulerDiscreteScheduler",
        {"timestep_spacing": "linspace"},
        {
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "sigma_min": None,
            "sigma_max": None,
            **_OTHER_SPACINGS,
        },
    ),
    "euler-ancestral": Sampler("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, {}),
    "heun": Sampler(
        "HeunDiscreteScheduler",
        {"timestep_spacing": "linspace", "beta_start": 0.00085, "beta_end": 0.012},
        {"clip_sample": False, **_OTHER_SPACINGS},
    ),
    "unipc": Sampler(
        "UniPCMultistepScheduler",
        {"timestep_spacing": "linspace"},
        {
            "thresholding": False,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
            **_FLOW,
            **_OTHER_SPACINGS,
        },
    ),
    "ddpm": Sampler(
        "DDPMScheduler",
        {"clip_sample": True},
        {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"},
    ),
    "lcm": Sampler(
        "LCMScheduler",
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"clip_sample": False, "thresholding": False},
    ),
}  # fmt: skip
# The samplers whose options know Karras' spacing.
KARRAS_SAMPLERS: tuple[Kind, ...] = ("dpm++", "euler", "heun", "unipc")
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


@dataclass(frozen=True)
class SchedulerConfig:
    """A sampler and the noise schedule that its model was trained with; the fields are diffusers'."""

    kind: Kind
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    # What the network predicts: the noise, or alpha * noise - sigma * image.
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    # dpm++, euler, heun and unipc: the steps where Karras et al. 2022 have them, and not by the timestep.
    use_karras_sigmas: bool = False
    # ddim and pndm: whether the last step ends at the clean image, and not at training's least noise.
    set_alpha_to_one: bool = True
    # The betas changed so that the last timestep is pure noise.
    rescale_betas_zero_snr: bool = False
    # dpm++ and unipc: which last steps are of first order; and, as euler, where they end.
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"
    # lcm: the steps of its distillation, of which its own are some; and how fast it trusts the network.
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


def read_config(stored: Mapping[str, Any], name: str, kind: Kind | None = None) -> SchedulerConfig:
    """Translates a diffusers scheduler_config.json.

    Args:
        stored: its content.
        name: its path, for messages.
        kind: a sampler to use instead of the stored one, on the stored noise schedule.

    Raises:
        SchedulerError: a class or an option that is not supported.
    """
    own = next((k for k, sampler in SAMPLERS.items() if sampler.name == stored.get("_class_name")), None)
    chosen = kind or own
    if chosen is None:
        raise SchedulerError(
            f"{name}: _class_name is {stored.get('_class_name')!r}; there are "
            f"{', '.join(sampler.name for sampler in SAMPLERS.values())}; "
            f"choose one with --scheduler {'|'.join(SAMPLERS)}, and it runs on the same noise schedule"
        )
    if problems := _problems(stored, chosen, own):
        others = [k for k in SAMPLERS if k not in (own, chosen) and not _problems(stored, k, own)]
        hint = f"; on the same noise schedule there is --scheduler {'|'.join(others)}" if others else ""
        raise SchedulerError(f"{name}: not supported: {', '.join(problems)}{hint}")
    values = SAMPLERS[chosen].defaults | dict(stored)
    if chosen not in KARRAS_SAMPLERS:
        for spacing in SPACINGS:
            if values.pop(spacing, False):
                log.warning("%s: %s has no effect on %s, as in diffusers", name, spacing, chosen)
    fields = {f.name for f in dataclasses.fields(SchedulerConfig)} - {"kind"}
    return SchedulerConfig(kind=chosen, **{n: v for n, v in values.items() if n in fields and v is not None})


def _problems(stored: Mapping[str, Any], chosen: Kind, own: Kind | None) -> list[str]:
    """What of a stored configuration the sampler cannot do."""
    values = SAMPLERS[chosen].defaults | dict(stored)
    problems = [
        f"{n}={values[n]!r} (there is {', '.join(c)})" for n, c in CHOICES.items() if values.get(n, c[0]) not in c
    ]
    # The noise schedule's option matters to every sampler; its class's own ones, but for the spacing, to that class.
    known = SAMPLERS[chosen].expected
    expected = {"trained_betas": None} | {n: v for n, v in known.items() if chosen == own or n in SPACINGS}
    # Nothing and no are one, as in diffusers.
    absent = [n for n, v in expected.items() if (values.get(n, v) or None) != (v or None)]
    problems += [f"{n}={values[n]!r} (there is {expected[n]!r})" for n in absent]
    if values.get("rescale_betas_zero_snr"):
        if values.get("prediction_type", "epsilon") == "epsilon":
            problems.append("rescale_betas_zero_snr=True (needs prediction_type='v_prediction')")
        if chosen == "heun":
            problems.append("rescale_betas_zero_snr=True (which Heun does not have)")
    if chosen == "unipc" and values.get(KARRAS) and values.get("final_sigmas_type") == "sigma_min":
        problems.append("use_karras_sigmas=True with final_sigmas_type='sigma_min' (two steps in one place)")
    return problems
