"""Adam with the reference's schedule."""

from __future__ import annotations

import optax

from asymvq_jax.config import Config
from asymvq_jax.models.parameters import Params


def learning_rate(peak: float, minimum: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from 1 % of `peak` over the warm-up, then a cosine down to `minimum` (absolute) at `steps`."""
    minimum = min(minimum, peak)
    decay = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1), alpha=minimum / peak)
    if not warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.01 * peak, peak, warmup_steps), decay], [warmup_steps])


def autoencoder_optimizer(config: Config, params: Params) -> optax.GradientTransformation:
    """Adam for the trained half; all but the condition branch take optimizer.pretrained_scale of the rate."""
    c = config.optimizer
    labels = {name: "condition" if name.startswith("decoder.condition.") else "rest" for name in params}
    scales = {"condition": 1.0, "rest": c.pretrained_scale}
    schedules = {
        label: optax.scale_by_learning_rate(_schedule(config, scale, config.run.steps))
        if scale
        else optax.set_to_zero()
        for label, scale in scales.items()
    }
    return optax.chain(optax.scale_by_adam(*c.betas), optax.partition(schedules, labels))


def discriminator_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam for the discriminator, whose schedule begins when it does."""
    steps = config.run.steps - max(config.loss.gan_start, 0)
    return optax.chain(
        optax.scale_by_adam(*config.optimizer.betas), optax.scale_by_learning_rate(_schedule(config, 1.0, steps))
    )


def _schedule(config: Config, scale: float, steps: int) -> optax.Schedule:
    c = config.optimizer
    peak = c.base_learning_rate * config.data.batch_size * scale
    return learning_rate(peak, c.min_learning_rate, c.warmup_steps, steps)
