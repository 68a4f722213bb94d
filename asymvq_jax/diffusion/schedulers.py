"""Samplers of diffusion models as tables: DDIM, PNDM and DPM-Solver++ (2M).

Each is a linear multistep method: the next sample is a weighted sum of the last samples and of the network's last
outputs, whose weights follow from the noise schedule alone. So a sampler is a table of weights, computed once in
float64, and one pure function applies a row of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax.errors import SchedulerError

Kind = Literal["ddim", "pndm", "dpm++"]
# diffusers' class of each kind, and the values that its scheduler_config.json has where it says nothing.
CLASSES: dict[str, Kind] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++",
}
DEFAULTS: dict[Kind, dict[str, Any]] = {
    "ddim": {"set_alpha_to_one": True, "timestep_spacing": "leading", "clip_sample": True},
    "pndm": {"set_alpha_to_one": False, "timestep_spacing": "leading", "skip_prk_steps": False},
    "dpm++": {"timestep_spacing": "linspace"},
}
# Of each class's options, those that change what is computed and that we do not have, with the value that we have.
EXPECTED: dict[Kind, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "thresholding": False},
    "pndm": {"skip_prk_steps": True},
    "dpm++": {
        "thresholding": False,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lambda_min_clipped": -np.inf,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "variance_type": None,
    },
}
# Of these, those that say where the steps lie: they matter to a sampler that knows them, of any class.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
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
    # ddim and pndm: whether the last step ends at the clean image, and not at training's least noise.
    set_alpha_to_one: bool = True
    # The betas changed so that the last timestep is pure noise.
    rescale_betas_zero_snr: bool = False
    # dpm++: which last steps are of first order, and where they end.
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"


def read_config(stored: Mapping[str, Any], name: str, kind: Kind | None = None) -> SchedulerConfig:
    """Translates a diffusers scheduler_config.json.

    Args:
        stored: its content.
        name: its path, for messages.
        kind: a sampler to use instead of the stored one, on the stored noise schedule.

    Raises:
        SchedulerError: a class or an option that is not supported.
    """
    own = CLASSES.get(str(stored.get("_class_name")))
    chosen = kind or own
    if chosen is None:
        raise SchedulerError(
            f"{name}: _class_name is {stored.get('_class_name')!r}; there are {', '.join(CLASSES)}; "
            f"choose one with --scheduler {'|'.join(DEFAULTS)}, and it runs on the same noise schedule"
        )
    values = DEFAULTS[chosen] | dict(stored)
    problems = [
        f"{n}={values[n]!r} (there is {', '.join(c)})" for n, c in CHOICES.items() if values.get(n, c[0]) not in c
    ]
    # The noise schedule's option matters to every sampler; its class's own ones, but for the spacing, to that class.
    known = EXPECTED[chosen]
    expected = {"trained_betas": None} | {n: v for n, v in known.items() if chosen == own or n in SPACINGS}
    absent = [n for n, v in expected.items() if values.get(n, v) != v]
    problems += [f"{n}={values[n]!r} (there is {expected[n]!r})" for n in absent]
    if values.get("rescale_betas_zero_snr") and values.get("prediction_type", "epsilon") == "epsilon":
        problems.append("rescale_betas_zero_snr=True (needs prediction_type='v_prediction')")
    if problems:
        others = [
            f"--scheduler {other}" for other in DEFAULTS if other not in (own, chosen) and {*absent} <= known.keys()
        ]
        hint = f"; {' or '.join(others)} runs on the same noise schedule" if others and absent else ""
        raise SchedulerError(f"{name}: not supported: {', '.join(problems)}{hint}")
    fields = {f.name for f in dataclasses.fields(SchedulerConfig)} - {"kind"}
    return SchedulerConfig(kind=chosen, **{n: v for n, v in values.items() if n in fields})


class Solver(NamedTuple):
    """A sampler's table, one row a call of the network; the columns are the last samples and outputs, newest first."""

    # (n,) int32: the timestep that the network is given.
    timesteps: np.ndarray
    # (n, 1 or 2) float32.
    samples: np.ndarray
    # (n, 1, 2 or 5) float32.
    outputs: np.ndarray


class History(NamedTuple):
    """The last samples and outputs of a run, newest first along axis 0."""

    samples: jax.Array
    outputs: jax.Array


def begin(solver: Solver, noise: jax.Array) -> History:
    """The history at the start, from noise (b, h, w, c) of variance 1, in float32."""
    noise = noise.astype(jnp.float32)
    samples = jnp.zeros((solver.samples.shape[1], *noise.shape), jnp.float32).at[0].set(noise)
    return History(samples, jnp.zeros((solver.outputs.shape[1], *noise.shape), jnp.float32))


def advance(row: Solver, history: History, output: jax.Array) -> History:
    """One step: `row` of the table applied to the history and the network's newest output, (b, h, w, c)."""
    outputs = _push(history.outputs, output.astype(jnp.float32))
    sample = _weigh(row.samples, history.samples) + _weigh(row.outputs, outputs)
    return History(_push(history.samples, sample), outputs)


def _push(history: jax.Array, newest: jax.Array) -> jax.Array:
    return jnp.concatenate([newest[None], history[:-1]])


def _weigh(weights: jax.Array | np.ndarray, arrays: jax.Array) -> jax.Array:
    # Not a dot product, which a TPU would compute in bfloat16.
    return jnp.sum(weights.reshape(-1, *[1] * (arrays.ndim - 1)) * arrays, 0)


def make_solver(config: SchedulerConfig, steps: int) -> Solver:
    """The table for a number of steps; PNDM calls the network once more.

    Raises:
        SchedulerError: fewer than one step, or more than the training's timesteps, so spaced, have room for.
    """
    if (timesteps := _timesteps(config, steps)) is None:
        count = config.num_train_timesteps
        most = next((n for n in range(count, 0, -1) if _timesteps(config, n) is not None), 0)
        raise SchedulerError(
            f"steps={steps}: expected 1 to {most}, for {count} timesteps of training with "
            f"timestep_spacing={config.timestep_spacing!r} and steps_offset={config.steps_offset}"
        )
    make = {"ddim": _ddim, "pndm": _pndm, "dpm++": _dpm}[config.kind]
    with np.errstate(divide="ignore", invalid="ignore"):
        timesteps, samples, outputs = make(config, timesteps, _alphas(config))
    if not (np.isfinite(samples).all() and np.isfinite(outputs).all()):
        raise SchedulerError(
            f"{config.kind} cannot start from pure noise (rescale_betas_zero_snr=True with "
            f"timestep_spacing={config.timestep_spacing!r}); choose another sampler"
        )
    return Solver(timesteps.astype(np.int32), samples.astype(np.float32), outputs.astype(np.float32))


def _timesteps(config: SchedulerConfig, steps: int) -> np.ndarray | None:
    """The timesteps in falling order; None where the training's have no room for so many."""
    count = config.num_train_timesteps
    if not 1 <= steps <= count:
        return None
    timesteps = (_dpm_timesteps if config.kind == "dpm++" else _spaced)(config, steps)
    fits = timesteps.min() >= 0 and timesteps.max() < count and len(np.unique(timesteps)) == steps
    return timesteps if fits else None


Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def _alphas(config: SchedulerConfig) -> np.ndarray:
    """Share of the image's variance in a sample at each timestep of training (the cumulative product of 1 - beta)."""
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, count)
    else:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    alphas = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:
        # Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        if config.kind == "dpm++":
            # Its ratios need a signal, however small; diffusers' value.
            alphas[-1] = 2**-24
    return alphas


def _spaced(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps in falling order for ddim and pndm."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps).round()[::-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps) + config.steps_offset
    return np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1


def _estimates(config: SchedulerConfig, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of (sample, output) in the estimate of the clean image, and in that of the noise: (..., 2) each."""
    a, s = np.sqrt(alpha), np.sqrt(1 - alpha)
    zero, one = np.zeros_like(a), np.ones_like(a)
    if config.prediction_type == "epsilon":
        return np.stack([one / a, -s / a], -1), np.stack([zero, one], -1)
    return np.stack([a, -s], -1), np.stack([s, a], -1)


def _at(config: SchedulerConfig, alphas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """`alphas` at the timesteps; before the first one, the end that ddim and pndm run to."""
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    return np.where(timesteps >= 0, alphas[np.maximum(timesteps, 0)], final)


def _ddim(config: SchedulerConfig, timesteps: np.ndarray, alphas: np.ndarray) -> Table:
    """Song et al. 2020, equation 12 with sigma = 0."""
    following = _at(config, alphas, timesteps - config.num_train_timesteps // len(timesteps))[:, None]
    image, noise = _estimates(config, alphas[timesteps])
    weights = np.sqrt(following) * image + np.sqrt(1 - following) * noise
    return timesteps, weights[:, :1], weights[:, 1:]


# PNDM's weights of the last outputs: while there are two, three, and four of them.
ADAMS_BASHFORTH = [
    np.array(w) for w in ([3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
]


def _pndm(config: SchedulerConfig, timesteps: np.ndarray, alphas: np.ndarray) -> Table:
    """Liu et al. 2022, equation 11 in the transfer and 12 in the multistep part, as Stable Diffusion has it (PLMS).

    There is no Runge-Kutta start: the first step is done, the network called where it ended, and the step done again
    from its beginning with the mean of both outputs. The second of them has no place in the later steps' history.
    """
    steps = len(timesteps)
    stride = config.num_train_timesteps // steps
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    start, end = timesteps.copy(), timesteps - stride
    if steps > 1:
        start[1], end[1] = timesteps[1] + stride, timesteps[1]
    a, b = _at(config, alphas, start), _at(config, alphas, end)
    on_output = -(b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
    on_sample = np.sqrt(b / a)
    if config.prediction_type == "v_prediction":
        on_sample, on_output = on_sample + on_output * np.sqrt(1 - a), on_output * np.sqrt(a)
    samples, outputs = np.zeros((len(timesteps), 2)), np.zeros((len(timesteps), 5))
    samples[:, 0] = on_sample
    for i, row in enumerate(outputs):
        if i == 0:
            row[0] = 1
        elif i == 1:
            row[:2] = 1 / 2
            samples[1] = [0, on_sample[1]]
        else:
            places = [age for age in range(5) if i - age != 1]
            mix = ADAMS_BASHFORTH[min(i, 4) - 2]
            row[places[: len(mix)]] = mix
    return timesteps, samples, outputs * on_output[:, None]


def _dpm(config: SchedulerConfig, timesteps: np.ndarray, alphas: np.ndarray) -> Table:
    """Lu et al. 2022b, algorithm 2 (2M), the first step and some of the last ones of first order."""
    alpha = alphas[timesteps]
    last = alphas[0] if config.final_sigmas_type == "sigma_min" else 1.0
    a, s = (np.sqrt(np.append(x, y)) for x, y in ((alpha, last), (1 - alpha, 1 - last)))
    log_snr = np.log(a) - np.log(s)
    step = np.diff(log_snr)
    gain = a[1:] - s[1:] * a[:-1] / s[:-1]
    second = np.ones(len(timesteps), bool)
    second[0] = False
    if (
        config.euler_at_final
        or (config.lower_order_final and len(timesteps) < 15)
        or config.final_sigmas_type == "zero"
    ):
        second[-1] = False
    # Half the ratio of this step to the one before it: the weight of the estimates' difference.
    slope = np.where(second, np.append(0.0, step[1:] / step[:-1] / 2), 0.0) if len(step) > 1 else np.zeros(1)
    image, _ = _estimates(config, alpha)
    newest = (gain * (1 + slope))[:, None] * image
    before = np.zeros_like(newest)
    before[1:] = (-gain * slope)[1:, None] * image[:-1]
    samples = np.stack([s[1:] / s[:-1] + newest[:, 0], before[:, 0]], -1)
    return timesteps, samples, np.stack([newest[:, 1], before[:, 1]], -1)


def _dpm_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray:
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if config.timestep_spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * (count // (steps + 1)) + config.steps_offset
    return np.arange(count, 0, -count / steps).round().astype(np.int64) - 1
