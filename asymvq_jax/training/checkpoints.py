"""Checkpoints on disk.

A model checkpoint is a directory with two Orbax items: `config` (JSON) and `model` (every parameter of the autoencoder
under its dotted name). `asymvq_jax.convert` writes one; so is each step of a training run, which adds what resuming
needs. Writing is atomic: a directory that is there is complete.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as cm

from asymvq_jax import config as configs
from asymvq_jax.config import Config
from asymvq_jax.errors import CheckpointError
from asymvq_jax.files.outputs import try_out
from asymvq_jax.models.checkpoints import STEPS, checkpoint_path, find_step, load_model, load_parameters, save_model

if TYPE_CHECKING:
    from asymvq_jax.training.state import TrainState

# Those of a model alone are public here too.
__all__ = ["RunCheckpoints", "find_step", "load_model", "load_parameters", "save_model"]

log = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints of one training run: written in the background, complete or absent, the last ones and the best.

    Each step holds the items `config`, `model`, `ema` (where kept), `training` (optimizers, discriminator, batch
    statistics, key, step) and `progress` (the data iterator's position and the elapsed time).
    """

    def __init__(self, config: Config) -> None:
        root = checkpoint_path(config.run.directory) / STEPS
        try:
            try_out(root)
        except OSError as error:
            raise CheckpointError(f"run.directory={config.run.directory!r} is not writable: {error}") from None
        keep = cm.AnyPreservationPolicy(
            [
                cm.LatestN(config.run.keep),
                cm.BestN(
                    get_metric_fn=lambda metrics: metrics["nll"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._config = config
        self._manager = ocp.CheckpointManager(
            root, options=ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
        )
        self._unchecked = False

    def latest_step(self) -> int | None:
        """The last complete step; None in a new run."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Begins to write `state`; the arrays are copied before this returns, so that the step may reuse them.

        Args:
            state: the training state.
            progress: "iterator" and "seconds", serialisable as JSON.
            metrics: held-out metrics, of which "nll" decides which step is the best.

        Raises:
            CheckpointError: this step, or the one before it, cannot be written.
        """
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        items = {
            "config": ocp.args.JsonSave(dataclasses.asdict(self._config)),
            "model": ocp.args.StandardSave({**state.params, **state.frozen}),
            "training": ocp.args.StandardSave(_training_items(state)),
            "progress": ocp.args.JsonSave(progress),
        }
        if state.ema:
            items["ema"] = ocp.args.StandardSave(state.ema)
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        self._unchecked = True

    def check(self) -> None:
        """Raises CheckpointError, in all processes alike, where a step written in the background has failed."""
        if not self._unchecked:
            return
        ended = not self._manager.is_saving_in_progress()
        if not multihost_utils.process_allgather(np.array(ended)).all():
            return
        self._unchecked = False
        # Not check_for_errors, which may take the error from the thread that then deletes old steps.
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one step onto the shardings of `abstract`, whatever mesh wrote it.

        Raises:
            CheckpointError: the step was written with a configuration that this one cannot continue.
        """
        stored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        _check_resumable(configs.from_dict(Config, stored), self._config)
        items = {
            "model": ocp.args.StandardRestore({**abstract.params, **abstract.frozen}),
            "training": ocp.args.StandardRestore(_training_items(abstract)),
            "progress": ocp.args.JsonRestore(),
        }
        if abstract.ema:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = abstract._replace(
            **read["training"],
            params={name: read["model"][name] for name in abstract.params},
            frozen={name: read["model"][name] for name in abstract.frozen},
            ema=read["ema"] if abstract.ema else {},
        )
        return state, read["progress"]

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: the last step cannot be written.
        """
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors.
            raise CheckpointError(
                f"run.directory={self._config.run.directory!r}: a checkpoint cannot be written: "
                f"{str(error).splitlines()[0]}; the earlier ones are intact: start again to resume from the last"
            ) from error


def _training_items(state: TrainState) -> dict[str, Any]:
    return {k: v for k, v in state._asdict().items() if k not in ("params", "frozen", "ema")}


# What may differ between the two halves of a resumed run, by the beginning of its name.
_CHANGEABLE = (
    "run.", "mesh.", "model.dtype", "model.remat", "data.workers", "data.prefetch", "data.max_corrupt_share",
    "data.data_dir", "data.path", "data.eval_path", "data.eval_split", "optimizer.base_learning_rate",
    "optimizer.min_learning_rate", "optimizer.warmup_steps", "optimizer.betas", "optimizer.pretrained_scale",
    "loss.perceptual_weight", "loss.kl_weight", "loss.codebook_weight", "loss.commitment_weight", "loss.gan_start",
    "loss.gan_weight",
)  # fmt: skip
_FIXED = ("run.seed", "run.train_encoder")


def _check_resumable(stored: Config, current: Config) -> None:
    old, new = configs.flatten(stored), configs.flatten(current)
    changed = {n: f"{n}={new[n]!r} (there {old[n]!r})" for n in new if old[n] != new[n]}
    broken = [text for n, text in changed.items() if n in _FIXED or not n.startswith(_CHANGEABLE)]
    if broken:
        raise CheckpointError(
            f"{current.run.directory} holds a run of another configuration: {', '.join(broken)}; "
            "restore these values, or choose another run.directory"
        )
    if changed:
        log.info("resuming with changed fields: %s", ", ".join(changed.values()))
