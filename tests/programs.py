"""Programs that the runs of one test process share, since tracing them takes longer than they do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import pytest

from asymvq_jax.config import Config, DataConfig, RunConfig
from asymvq_jax.training import loop

# Of a run's fields, those on which neither its state nor a step depends.
UNSEEN = (
    "directory", "init_from", "log_every", "eval_every", "eval_pictures", "keep", "fall_back", "profile_steps",
    "wait_limit",
)  # fmt: skip


def _seen(config: Config) -> Config:
    """The configuration with what its programs do not see left at one value."""
    plain = RunConfig(directory="anywhere", init_from="anywhere")
    unseen = UNSEEN if config.optimizer.schedule == "cosine" else (*UNSEEN, "steps")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, **{name: getattr(plain, name) for name in unseen}),
        data=DataConfig(image_size=config.data.image_size, batch_size=config.data.batch_size),
    )


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Inside, runs whose programs are the same take them from the first of these runs, as `train` takes its own."""
    make_step, steps = loop.compiled_step, {}
    compile_anew, programs = loop.compiled, {}
    one_blueprint = functools.cache(loop.make_blueprint)

    def one_step(blueprint, state, mesh):
        # The state itself, which may be large, is not kept.
        key = blueprint, mesh, tuple(x.sharding for x in jax.tree.leaves(state))
        if key not in steps:
            steps[key] = make_step(blueprint, state, mesh)
        return steps[key]

    def one_program(traced):
        # Tracing again gives the first trace, as long as the step is the same.
        if traced.jaxpr not in programs:
            programs[traced.jaxpr] = compile_anew(traced)
        return programs[traced.jaxpr]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_blueprint", lambda config: one_blueprint(_seen(config)))
        patch.setattr(loop, "compiled_step", one_step)
        patch.setattr(loop, "compiled", one_program)
        for name in ("compiled_evaluation", "jitted"):
            patch.setattr(loop, name, functools.cache(getattr(loop, name)))
        yield
