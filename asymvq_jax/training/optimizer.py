"""Adam with the reference's schedule."""

from __future__ import annotations

import optax

from asymvq_jax.config import Config
from asymvq_jax.models.parameters import Params

# The warm-up begins at this share of the peak.
WARMUP_SHARE = 0.01


def learning_rate(peak: float, minimum: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from 1 % of `peak` over the warm-up, then a cosine down to `minimum` (absolute) at `steps`."""
    # One step at least, where the warm-up is longer than the run.
    end = max(steps, warmup_steps + 1)
    return optax.warmup_cosine_decay_schedule(WARMUP_SHARE * peak, peak, warmup_steps, end, min(minimum, peak))


def autoencoder_schedule(config: Config, scale: float = 1.0) -> optax.Schedule:
    """The learning rate by steps done: of the condition branch and of all that is new, times `scale` for the rest."""
    return _schedule(config, scale, config.run.steps)


def discriminator_schedule(config: Config) -> optax.Schedule:
    """The discriminator's learning rate by its own steps, whose schedule begins when it does."""
    return _schedule(config, 1.0, config.run.steps - max(config.loss.gan_start, 0))


def autoencoder_optimizer(config: Config, params: Params) -> optax.GradientTransformation:
    """Adam for the trained half; all but the condition branch and the tone field take optimizer.pretrained_scale."""
    c = config.optimizer
    labels = {name: "new" if name.startswith(("decoder.condition.", "decoder.tone.")) else "rest" for name in params}
    scales = {"new": 1.0, "rest": c.pretrained_scale}
    schedules = {
        label: optax.scale_by_learning_rate(autoencoder_schedule(config, scale)) if scale else optax.set_to_zero()
        for label, scale in scales.items()
    }
    return optax.chain(optax.scale_by_adam(*c.betas), optax.partition(schedules, labels))


def discriminator_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam for the discriminator, whose schedule begins when it does."""
    return optax.chain(
        optax.scale_by_adam(*config.optimizer.betas), optax.scale_by_learning_rate(discriminator_schedule(config))
    )


def _schedule(config: Config, scale: float, steps: int) -> optax.Schedule:
    c = config.optimizer
    peak = c.base_learning_rate * config.data.batch_size * scale
    if c.schedule == "constant":
        return optax.warmup_constant_schedule(WARMUP_SHARE * peak, peak, c.warmup_steps)
    return learning_rate(peak, c.min_learning_rate, c.warmup_steps, steps)
