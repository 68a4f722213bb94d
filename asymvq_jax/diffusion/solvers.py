"""Samplers as tables: DDIM, PNDM, DPM-Solver++ (2M), Euler, Euler ancestral, Heun, UniPC, DDPM and LCM.

Each is a linear multistep method: the next sample is a weighted sum of the last samples, of the network's last outputs
and, where it is stochastic, of fresh noise, whose weights follow from the noise schedule alone. So a sampler is a table
of weights, computed once in float64, and one pure function applies a row of it.

All samples have unit variance, sqrt(alpha) * image + sqrt(1 - alpha) * noise. What diffusers calls sigma in the
samplers after Karras et al. 2022 is sqrt(1 / alpha - 1), and their samples are ours divided by sqrt(alpha).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asymvq_jax.diffusion.schedulers import Kind, SchedulerConfig
from asymvq_jax.errors import SchedulerError


class Row(NamedTuple):
    """A call of the network and the step after it; in a table, with a leading axis of all of them.

    The columns are the last samples and outputs, newest first; all but the timesteps are weights.
    """

    # (), float32: what the network is given; between two of training's where the sampler wants it.
    timesteps: np.ndarray
    # (1 to 3,) float32.
    samples: np.ndarray
    # (1 to 5,) float32.
    outputs: np.ndarray
    # (2,) float32: of the image and of the noise in a sample after this step.
    levels: np.ndarray
    # (), float32: of fresh noise; None for a deterministic sampler.
    noise: np.ndarray | None


class Solver(NamedTuple):
    """A sampler's table."""

    rows: Row
    # (2,) float32: weights of the known image and of the noise in the first sample.
    start: np.ndarray


class History(NamedTuple):
    """The last samples and outputs of a run, newest first along axis 0."""

    samples: jax.Array
    outputs: jax.Array


def begin(solver: Solver, noise: jax.Array, image: jax.Array | None = None) -> History:
    """The history at the start, in float32.

    Args:
        solver: the table.
        noise: (b, h, w, c) of variance 1.
        image: (b, h, w, c), the known latent, for a table that starts from one (`strength` below 1).
    """
    noise = noise.astype(jnp.float32)
    first = solver.start[1] * noise
    if image is not None:
        first = first + solver.start[0] * image
    samples = jnp.zeros((solver.rows.samples.shape[1], *noise.shape), jnp.float32).at[0].set(first)
    return History(samples, jnp.zeros((solver.rows.outputs.shape[1], *noise.shape), jnp.float32))


def advance(row: Row, history: History, output: jax.Array, noise: jax.Array | None = None) -> History:
    """One step.

    Args:
        row: of the table.
        history: so far.
        output: (b, h, w, c), the network's newest.
        noise: (b, h, w, c) of variance 1, fresh for each step of a stochastic sampler.
    """
    outputs = _push(history.outputs, output.astype(jnp.float32))
    sample = _weigh(row.samples, history.samples) + _weigh(row.outputs, outputs)
    if row.noise is not None and noise is not None:
        sample = sample + row.noise * noise
    return History(_push(history.samples, sample), outputs)


def replace_newest(history: History, sample: jax.Array) -> History:
    """The history with another newest sample, such as one whose known region has been put back."""
    return history._replace(samples=history.samples.at[0].set(sample))


def _push(history: jax.Array, newest: jax.Array) -> jax.Array:
    return jnp.concatenate([newest[None], history[:-1]])


def _weigh(weights: jax.Array | np.ndarray, arrays: jax.Array) -> jax.Array:
    # Not a dot product, which a TPU would compute in bfloat16.
    return jnp.sum(weights.reshape(-1, *[1] * (arrays.ndim - 1)) * arrays, 0)


def make_solver(config: SchedulerConfig, steps: int, strength: float = 1.0) -> Solver:
    """The table for a number of steps; PNDM calls the network once more, Heun twice a step but for the last.

    Args:
        config: the sampler and its noise schedule.
        steps: of a run from pure noise.
        strength: the share of these steps, in (0, 1], that are done, the last ones; below 1 they start from the known
            image with noise on it.

    Raises:
        SchedulerError: fewer than one step, or more than the training's timesteps, so spaced, have room for.
    """
    if (timesteps := _timesteps(config, steps)) is None:
        count = config.num_train_timesteps
        most = next((n for n in range(count, 0, -1) if _timesteps(config, n) is not None), 0)
        spacing = f"timestep_spacing={config.timestep_spacing!r} and steps_offset={config.steps_offset}"
        if config.kind == "lcm":
            spacing = f"original_inference_steps={config.original_inference_steps}"
        raise SchedulerError(f"steps={steps}: expected 1 to {most}, for {count} timesteps of training with {spacing}")
    if not 0 < strength <= 1 or not (left := int(steps * strength)):
        raise SchedulerError(f"strength={strength:g}: expected more than {1 / steps:.3g}, one of {steps} steps, to 1")
    alphas = _alphas(config)
    grid = _grid(config, timesteps, alphas)
    grid = grid._replace(timesteps=grid.timesteps[steps - left :], alpha=grid.alpha[steps - left :])
    with np.errstate(divide="ignore", invalid="ignore"):
        table = MAKERS[config.kind](config, grid, alphas)
    start = np.sqrt([grid.alpha[0], 1 - grid.alpha[0]])
    if left == steps:
        # These samplers begin with as much noise as a sample has; the others, as diffusers, with variance 1.
        exact = config.kind in EXACT_STARTS and config.timestep_spacing != "leading"
        start = np.array([0, start[1] if exact else 1])
    if not all(np.isfinite(x).all() for x in (table.samples, table.outputs)):
        raise SchedulerError(
            f"{config.kind} has no such steps with rescale_betas_zero_snr={config.rescale_betas_zero_snr}, "
            f"timestep_spacing={config.timestep_spacing!r} and lower_order_final={config.lower_order_final}; "
            "choose another sampler"
        )
    following = np.append(table.alpha[1:], 1.0)
    rows = Row(
        table.timesteps,
        table.samples,
        table.outputs,
        np.sqrt(np.stack([following, 1 - following], -1)),
        table.noise,
    )
    return Solver(*jax.tree.map(lambda x: x.astype(np.float32), (rows, start)))


class Grid(NamedTuple):
    """Where the steps of a run lie, in falling order."""

    timesteps: np.ndarray
    # The share of the image's variance in a sample there.
    alpha: np.ndarray
    # Of the whole run, of which these may be the last.
    steps: int


class Table(NamedTuple):
    """The columns of a solver in float64, and the share of the image's variance in what the network is given."""

    timesteps: np.ndarray
    alpha: np.ndarray
    samples: np.ndarray
    outputs: np.ndarray
    noise: np.ndarray | None = None


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
        if config.kind in RATIOS:
            # Their ratios need a signal, however small; diffusers' value.
            alphas[-1] = 2**-24
    return alphas


def _timesteps(config: SchedulerConfig, steps: int) -> np.ndarray | None:
    """The timesteps in falling order by `timestep_spacing`; None where the training's have no room for so many."""
    count = config.num_train_timesteps
    if not 1 <= steps <= count:
        return None
    if config.kind == "lcm":
        return _lcm_timesteps(config, steps)
    timesteps = (_inner_spaced if config.kind in INNER else _spaced)(config, steps)
    fits = timesteps.min() >= 0 and timesteps.max() < count and len(np.unique(timesteps)) == steps
    return timesteps if fits else None


def _spaced(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps that begin at the last one of training; fractions where the sampler takes them."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps)[::-1]
        return timesteps if config.kind in EXACT_STARTS else timesteps.round()
    if config.timestep_spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps) + config.steps_offset
    return np.round(np.arange(count, 0, -count / steps)) - 1


def _inner_spaced(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Timesteps of a run of one step more, without its last."""
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[:0:-1]
    if config.timestep_spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * (count // (steps + 1)) + config.steps_offset
    return np.arange(count, 0, -count / steps).round() - 1


def _lcm_timesteps(config: SchedulerConfig, steps: int) -> np.ndarray | None:
    """Some of the steps of the distillation."""
    original = config.original_inference_steps
    if not steps <= original <= config.num_train_timesteps:
        return None
    trained = np.arange(1, original + 1)[::-1] * (config.num_train_timesteps // original) - 1
    chosen: np.ndarray = trained[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]
    return chosen


def _grid(config: SchedulerConfig, timesteps: np.ndarray, alphas: np.ndarray) -> Grid:
    """The noise at the timesteps; or Karras' noises, and the timesteps at which training had them."""
    every, sigmas = np.arange(len(alphas)), np.sqrt(1 / np.maximum(alphas, np.finfo(float).tiny) - 1)
    steps = len(timesteps)
    if not config.use_karras_sigmas:
        exact = alphas[timesteps.astype(np.int64)]
        between = 1 / (1 + np.interp(timesteps, every, sigmas) ** 2)
        return Grid(timesteps, np.where(timesteps % 1 == 0, exact, between), steps)
    # Karras et al. 2022, equation 5; between the ends of training, or of the timesteps.
    ends = sigmas[[-1, 0]] if config.kind in INNER else np.interp(timesteps[[0, -1]], every, sigmas)
    first, last = ends ** (1 / 7)
    chosen = np.linspace(first, last, steps) ** 7
    places = np.interp(np.log(chosen), np.log(sigmas), every)
    return Grid(places.round() if config.kind in INNER else places, 1 / (1 + chosen**2), steps)


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
    return np.where(timesteps >= 0, alphas[np.maximum(timesteps, 0).astype(np.int64)], final)


def _one_step(config: SchedulerConfig, grid: Grid, image: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights of the last sample and output, (n, 1) each, from those of the estimates of image and noise in a step."""
    images, noises = _estimates(config, grid.alpha)
    weights = image[:, None] * images + noise[:, None] * noises
    return weights[:, :1], weights[:, 1:]


def _ddim(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Song et al. 2020, equation 12 with sigma = 0."""
    following = _at(config, alphas, grid.timesteps - config.num_train_timesteps // grid.steps)
    return Table(*grid[:2], *_one_step(config, grid, np.sqrt(following), np.sqrt(1 - following)))


def _ddpm(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Ho et al. 2020, equations 6 and 7: the mean of the posterior, and its own variance."""
    alpha, following = grid.alpha, np.append(grid.alpha[1:], 1.0)
    ratio = alpha / following
    image = np.sqrt(following) * (1 - ratio) / (1 - alpha)
    samples, outputs = _one_step(config, grid, image, np.zeros_like(image))
    samples = samples + (np.sqrt(ratio) * (1 - following) / (1 - alpha))[:, None]
    variance = np.maximum((1 - following) / (1 - alpha) * (1 - ratio), 1e-20)
    return Table(*grid[:2], samples, outputs, np.where(grid.timesteps > 0, np.sqrt(variance), 0.0))


def _lcm(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Luo et al. 2023, algorithm 3: the clean image, and fresh noise on it."""
    # Equation 9 with the published spread of the data.
    time, spread = grid.timesteps * config.timestep_scaling, 0.5
    skip, trust = spread**2 / (time**2 + spread**2), time / np.sqrt(time**2 + spread**2)
    following = np.append(grid.alpha[1:], 1.0)
    samples, outputs = _one_step(config, grid, trust, np.zeros_like(trust))
    shrink = np.sqrt(following)[:, None]
    return Table(*grid[:2], shrink * (samples + skip[:, None]), shrink * outputs, np.sqrt(1 - following))


def _noise_levels(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For Euler's and Heun's: sigma at each step and at the end; and sqrt(alpha) after each step.

    The last sample is not divided to unit variance, as the picture is decoded from it.
    """
    last = np.sqrt(1 / alphas[0] - 1) if config.kind == "euler" and config.final_sigmas_type == "sigma_min" else 0.0
    return np.append(np.sqrt(1 / grid.alpha - 1), last), np.append(np.sqrt(grid.alpha[1:]), 1.0)


def _euler(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Karras et al. 2022, algorithm 2 without its correction and without churn."""
    sigma, shrink = _noise_levels(config, grid, alphas)
    return Table(*grid[:2], *_one_step(config, grid, shrink, shrink * sigma[1:]))


def _euler_ancestral(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Euler's step to less noise than is wanted, and fresh noise for the rest, as DDPM's variance has it."""
    sigma, shrink = _noise_levels(config, grid, alphas)
    up = sigma[1:] * np.sqrt(1 - (sigma[1:] / sigma[:-1]) ** 2)
    down = np.sqrt(sigma[1:] ** 2 - up**2)
    samples, outputs = _one_step(config, grid, shrink, shrink * down)
    return Table(grid.timesteps, grid.alpha, samples, outputs, shrink * up)


def _heun(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Karras et al. 2022, algorithm 1: Euler's step, and the same again with the mean of the noise at both its ends.

    The last step has no second part.
    """
    sigma, shrink = _noise_levels(config, grid, alphas)
    euler = _euler(config, grid, alphas)
    # Each step's rows: at its beginning, and but for the last at its end.
    places = np.repeat(np.arange(len(sigma) - 1), 2)[1:]
    samples, outputs = np.zeros((len(places), 2)), np.zeros((len(places), 2))
    samples[::2, :1], outputs[::2, :1] = euler.samples, euler.outputs
    _, noise = _estimates(config, grid.alpha)
    for i in range(len(grid.alpha) - 1):
        half = (sigma[i + 1] - sigma[i]) / 2
        samples[2 * i + 1] = half * noise[i + 1, 0], 1 / np.sqrt(grid.alpha[i]) + half * noise[i, 0]
        outputs[2 * i + 1] = half * noise[i + 1, 1], half * noise[i, 1]
        samples[2 * i + 1] *= shrink[i]
        outputs[2 * i + 1] *= shrink[i]
    return Table(grid.timesteps[places], grid.alpha[places], samples, outputs)


# PNDM's weights of the last outputs: while there are two, three, and four of them.
ADAMS_BASHFORTH = [
    np.array(w) for w in ([3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
]


def _pndm(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Liu et al. 2022, equation 11 in the transfer and 12 in the multistep part, as Stable Diffusion has it (PLMS).

    There is no Runge-Kutta start: the first step is done, the network called where it ended, and the step done again
    from its beginning with the mean of both outputs. The second of them has no place in the later steps' history.
    """
    stride = config.num_train_timesteps // grid.steps
    timesteps = np.concatenate([grid.timesteps[:2], grid.timesteps[1:]])
    start, end = timesteps.copy(), timesteps - stride
    if len(grid.timesteps) > 1:
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
    return Table(timesteps, _at(config, alphas, timesteps), samples, outputs * on_output[:, None])


class Steps(NamedTuple):
    """The steps of a solver in the logarithm of the signal-to-noise ratio, each from one place to the next."""

    # Of image and noise in a sample, at each place and at the end.
    a: np.ndarray
    s: np.ndarray
    # How far each step goes.
    length: np.ndarray


def _log_steps(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Steps:
    last = alphas[0] if config.final_sigmas_type == "sigma_min" else 1.0
    a, s = (np.sqrt(np.append(x, y)) for x, y in ((grid.alpha, last), (1 - grid.alpha, 1 - last)))
    return Steps(a, s, np.diff(np.log(a) - np.log(s)))


def _dpm(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Lu et al. 2022b, algorithm 2 (2M), the first step and some of the last ones of first order."""
    a, s, length = _log_steps(config, grid, alphas)
    gain = a[1:] - s[1:] * a[:-1] / s[:-1]
    second = np.ones(len(length), bool)
    second[0] = False
    if config.euler_at_final or (config.lower_order_final and grid.steps < 15) or config.final_sigmas_type == "zero":
        second[-1] = False
    # Half the ratio of this step to the one before it: the weight of the estimates' difference.
    slope = np.where(second, np.append(0.0, length[1:] / length[:-1] / 2), 0.0)
    image, _ = _estimates(config, grid.alpha)
    newest = (gain * (1 + slope))[:, None] * image
    before = np.zeros_like(newest)
    before[1:] = (-gain * slope)[1:, None] * image[:-1]
    samples = np.stack([s[1:] / s[:-1] + newest[:, 0], before[:, 0]], -1)
    return Table(*grid[:2], samples, np.stack([newest[:, 1], before[:, 1]], -1))


def _unipc(config: SchedulerConfig, grid: Grid, alphas: np.ndarray) -> Table:
    """Zhao et al. 2023, UniPC of second order with B(h) = exp(h) - 1, predicting the image.

    Each step first corrects where the last one ended, which the network has now seen: by a weighted sum of the last
    three estimates of the image. So a step's weights are those of both.
    """
    a, s, length = _log_steps(config, grid, alphas)
    gain = a[1:] * -np.expm1(-length)
    count = len(length)
    image, _ = _estimates(config, grid.alpha)
    samples, outputs = np.zeros((count, 3)), np.zeros((count, 3))
    correction = np.zeros(3)
    for i in range(count):
        carried = s[i + 1] / s[i]
        weights = carried * correction
        weights[0] += gain[i]
        first = i == 0 or (config.lower_order_final and i == count - 1)
        # Of the last estimate's change, to the next place and then to the one after it.
        slope = np.zeros(3)
        if not first:
            ratio = length[i] / length[i - 1]
            slope[:2] = ratio, -ratio
        weights += gain[i] / 2 * slope
        seen = min(i + 1, 3)
        samples[i, :seen], outputs[i, :seen] = (weights[:seen, None] * image[i::-1][:seen]).T
        samples[i, 0] += carried
        # Equation 4 at the place where this step ends, less what the prediction already has of it.
        old = np.append(0.0, slope[:2])
        change = np.array([1.0, -1.0, 0.0])
        if first:
            correction = gain[i] / 2 * change
        else:
            on_old, on_change = _corrector(length[i], -length[i - 1] / length[i])
            correction = gain[i] * ((on_old - 1 / 2) * old + on_change * change)
    return Table(*grid[:2], samples, outputs)


def _corrector(length: float, place: float) -> tuple[float, float]:
    """The weights of UniPC's correction: of the change to the place before, divided by `place`, and of the new one."""
    phi1 = np.expm1(-length) / -length - 1
    phi2 = phi1 / -length - 1 / 2
    right = np.array([phi1, 2 * phi2]) / np.expm1(-length)
    old, new = np.linalg.solve(np.array([[1.0, 1.0], [place, 1.0]]), right)
    return float(old), float(new)


MAKERS: dict[Kind, Callable[[SchedulerConfig, Grid, np.ndarray], Table]] = {
    "ddim": _ddim,
    "pndm": _pndm,
    "dpm++": _dpm,
    "euler": _euler,
    "euler-ancestral": _euler_ancestral,
    "heun": _heun,
    "unipc": _unipc,
    "ddpm": _ddpm,
    "lcm": _lcm,
}
# Those after Karras et al. 2022, whose first sample has exactly the noise of its place.
EXACT_STARTS: tuple[Kind, ...] = ("euler", "euler-ancestral", "heun")
# Those that divide by the signal, and those that step in the logarithm of the signal-to-noise ratio.
RATIOS: tuple[Kind, ...] = ("dpm++", "euler", "euler-ancestral", "unipc")
INNER: tuple[Kind, ...] = ("dpm++", "unipc")
