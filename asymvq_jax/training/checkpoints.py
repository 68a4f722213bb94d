"""Checkpoints on disk.

A model checkpoint is a directory with two Orbax items: `config` (JSON) and `model` (every parameter of the autoencoder
under its dotted name). `asymvq_jax.convert` writes one; so is each step of a training run, which adds what resuming
needs. Writing is atomic: a directory that is there is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as cm

from asymvq_jax import config as configs
from asymvq_jax.config import Config
from asymvq_jax.errors import CheckpointError, ConfigError, OutputError, UnansweredError, first_line
from asymvq_jax.files.addresses import in_bucket, is_unanswered, move_folder
from asymvq_jax.files.locks import only_owner
from asymvq_jax.files.outputs import explained, try_out
from asymvq_jax.models.checkpoints import (
    FINGERPRINTS,
    STEPS,
    CannotReadError,
    check_fingerprints,
    checkpoint_path,
    find_step,
    load_model,
    load_parameters,
    reading,
    save_model,
)
from asymvq_jax.models.parameters import all_finite, fingerprint

if TYPE_CHECKING:
    from asymvq_jax.training.state import TrainState

# Those of a model alone are public here too.
__all__ = ["RunCheckpoints", "find_step", "load_model", "load_parameters", "save_model"]

log = logging.getLogger(__name__)


# Where steps go that cannot be read, when a run goes back to an earlier one.
DAMAGED = "damaged"
# An array that several devices hold is written in slices, one by each, if these have at least so many bytes; otherwise
# one device writes it whole. By default Orbax slices every bias, and the run waits for thousands of slices.
MIN_SLICE_BYTES = 16 * 2**10


def make_run_directory(config: Config) -> epath.Path:
    """Makes the directory of a run's steps and tries it out.

    Raises:
        CheckpointError: it cannot be written to.
        ConfigError: it is in a bucket, and the package for that is missing.
    """
    root = checkpoint_path(config.run.directory, "run.directory") / STEPS
    try:
        try_out(root)
    except OSError as error:
        reason = explained(error, root)
        raise CheckpointError(f"run.directory={config.run.directory!r} is not writable: {reason}") from None
    return root


@contextmanager
def owned(config: Config) -> Iterator[None]:
    """Inside, this run alone writes run.directory; process 0 holds it for all of them.

    Raises:
        CheckpointError, ConfigError: as `make_run_directory`.
        OutputError: another run is writing it.
    """
    new = not in_bucket(config.run.directory) and not os.path.exists(config.run.directory)
    root = make_run_directory(config)
    refused = np.array(False)
    try:
        with ExitStack() as held:
            reason = f"another run is writing {root}, as process 0 found"
            if jax.process_index() == 0:
                try:
                    held.enter_context(only_owner(root, "run"))
                except OutputError as error:
                    refused, reason = np.array(True), str(error)
            if multihost_utils.process_allgather(refused).any():
                raise OutputError(reason)
            yield
    finally:
        if new:
            # A run that was refused leaves nothing behind; a directory with anything in it stays.
            with suppress(OSError):
                os.rmdir(root)
                os.rmdir(root.parent)


class Resumed(NamedTuple):
    """What a step of a run holds."""

    state: TrainState
    # As given to `save`.
    progress: dict[str, Any]
    # The configuration that the step was written with.
    config: Config


class _Manager(ocp.CheckpointManager):  # type: ignore[misc]  # Orbax has no types.
    """Orbax's, which leaves it to the loop to ask whether the run is to stop, and says at once what has failed."""

    # Why this process cannot write its part of a step, while Orbax's thread already waits for the other processes.
    failure: Exception | None = None

    def reached_preemption(self, step: int) -> bool:
        """Never: JAX's service compares one number, and Orbax's steps would go far beyond the loop's calls."""
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise


class RunCheckpoints:
    """The checkpoints of one training run: written in the background, complete or absent, the last ones and the best.

    Each step holds the items `config`, `model`, `ema` (where kept), `training` (optimizers, discriminator, batch
    statistics, key, step) and `progress` (the data iterator's position, the elapsed time, and what the inputs were).
    """

    def __init__(self, config: Config) -> None:
        self._root = make_run_directory(config)
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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=True,
            # What is written in the background waits for the other processes' parts.
            async_options=ocp.AsyncOptions(
                timeout_secs=math.ceil(config.run.wait_limit),
                # Else a step whose directory cannot be made is waited for until then.
                create_directories_asynchronously=False,
            ),
        )
        handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)
        # Of the whole process: StandardSave takes no handlers of its own.
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        with self._opening():
            self._manager = _Manager(self._root, options=options)
        self._unchecked = False

    def latest_step(self) -> int | None:
        """The last complete step; None in a new run."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, state: TrainState, progress: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Begins to write `state`; the arrays are copied before this returns, so that the step may reuse them.

        Args:
            state: the training state.
            progress: "iterator", "seconds" and "inputs", serialisable as JSON.
            metrics: held-out metrics, of which "nll" decides which step is the best.

        Raises:
            CheckpointError, UnansweredError: this step, or the one before it, cannot be written.
        """
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        progress = {**progress, FINGERPRINTS: {name: fingerprint(x) for name, x in _arrays(state).items()}}
        items = {
            "config": ocp.args.JsonSave(dataclasses.asdict(self._config)),
            **{name: ocp.args.StandardSave(arrays) for name, arrays in _arrays(state).items()},
            "progress": ocp.args.JsonSave({**progress, "digest": _digest(progress)}),
        }
        self._settle()
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        self._unchecked = True

    def check(self) -> None:
        """Raises, in all processes alike, as `save`, where a step written in the background has failed in one."""
        if not self._unchecked:
            return
        # By itself a process does not end before the others have written their parts, which wait for its own.
        failed = self._manager.failure if jax.process_count() > 1 else None
        ended = failed is not None or not self._manager.is_saving_in_progress()
        failure: CheckpointError | UnansweredError | None = None
        try:
            if ended:
                # Not check_for_errors, which may take the error from the thread that then deletes old steps.
                with self._writing():
                    if failed is not None:
                        raise failed
                    self._manager.wait_until_finished()
        except (CheckpointError, UnansweredError) as error:
            failure = error
        # The others would wait for this one's part.
        mine = np.array([ended, failure is not None, isinstance(failure, CheckpointError)])
        gathered = multihost_utils.process_allgather(mine).reshape(-1, 3)
        self._unchecked = not gathered[:, 0].all()
        if failure is not None:
            raise failure
        if gathered[:, 1].any():
            who = ", ".join(map(str, np.flatnonzero(gathered[:, 1])))
            kind = CheckpointError if gathered[:, 2].any() else UnansweredError
            raise kind(self._not_written(f"that of process {who}, whose log says why"))

    def resume(self, abstract: TrainState, continues: Callable[[Resumed], None]) -> Resumed | None:
        """Reads the last step onto the shardings of `abstract`, written from any mesh.

        With run.fall_back, steps that cannot be read are moved to run.directory/damaged, and the last that can be is
        taken.

        Args:
            abstract: the state's shapes and shardings.
            continues: takes over what was read; an error that it raises means that the step is damaged.

        Returns:
            None in a new run.

        Raises:
            CheckpointError: the step is damaged, or was written with a configuration that this one cannot continue.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        reason = ""
        for step in steps:
            try:
                with reading(self._root / str(step)):
                    resumed = self._read(step, abstract)
                    continues(resumed)
            except CannotReadError as error:
                if isinstance(error.__cause__, _OtherRunError):
                    raise CheckpointError(str(error.__cause__)) from None
                reason = reason or str(error)
                damaged.append(step)
                continue
            if not damaged:
                return resumed
            if not self._config.run.fall_back:
                raise CheckpointError(f"{reason}; step {step} can be: --run.fall_back=true resumes from it")
            self._put_aside(damaged)
            log.warning("%s; resuming from step %d instead, and the later ones are in %s", reason, step, DAMAGED)
            return resumed
        if damaged:
            raise CheckpointError(f"{reason}; no earlier step can be; choose another run.directory to begin again")
        return None

    def _read(self, step: int, abstract: TrainState) -> Resumed:
        stored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        config = configs.from_dict(Config, stored)
        _check_resumable(config, self._config)
        items = {name: ocp.args.StandardRestore(arrays) for name, arrays in _arrays(abstract).items()}
        items["progress"] = ocp.args.JsonRestore()
        read = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = abstract._replace(
            **read["training"],
            params={name: read["model"][name] for name in abstract.params},
            frozen={name: read["model"][name] for name in abstract.frozen},
            ema=read["ema"] if abstract.ema else {},
        )
        progress = read["progress"]
        # Releases before 0.2 wrote none.
        if progress.pop("digest", None) not in (None, _digest(progress)):
            raise ValueError("its item 'progress' does not match its digest")
        check_fingerprints(_arrays(state), progress.pop(FINGERPRINTS, {}))
        if not bool(all_finite(state)):
            raise ValueError("its parameters are not finite")
        return Resumed(state, progress, config)

    def _put_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            aside = self._root.parent / DAMAGED
            for step in steps:
                target = next(
                    p for i in itertools.count() if not (p := aside / f"{step}{f'.{i}' if i else ''}").exists()
                )
                move_folder(self._root / str(step), target)
        multihost_utils.sync_global_devices("damaged steps are put aside")
        self._manager.reload()

    def close(self, *, together: bool) -> None:
        """Waits until everything is on disk.

        Args:
            together: whether all processes have come here, so that each learns of an error of another.

        Raises:
            CheckpointError: the last step cannot be written.
        """
        if together:
            self._settle()
        with self._writing():
            self._manager.close()

    def _settle(self) -> None:
        """Until the step in the background is written in all processes: Orbax waits for ever for one that failed."""
        while jax.process_count() > 1 and self._unchecked:
            self.check()
            time.sleep(0.05)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax's own, of many types, where its metadata are damaged.
            raise CheckpointError(f"{self._root} holds steps that cannot be listed: {first_line(error)}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            # A failed computation, or another process that has ended.
            raise
        except Exception as error:  # TensorStore's errors are ValueErrors, the file system's OSErrors, and others.
            kind = UnansweredError if is_unanswered(error) else CheckpointError
            raise kind(self._not_written(first_line(error))) from error

    def _not_written(self, reason: str) -> str:
        return (
            f"run.directory={self._config.run.directory!r}: a checkpoint cannot be written: {reason}; the earlier ones "
            "are intact: start again to resume from the last"
        )


def _digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()[:16]


def _arrays(state: TrainState) -> dict[str, Any]:
    """The items of a step that hold arrays."""
    training = {k: v for k, v in state._asdict().items() if k not in ("params", "frozen", "ema")}
    items = {"model": {**state.params, **state.frozen}, "training": training}
    return items | ({"ema": state.ema} if state.ema else {})


# What may differ between the two halves of a resumed run, by the beginning of its name.
_CHANGEABLE = (
    "run.", "mesh.", "model.dtype", "model.remat", "data.workers", "data.threads", "data.prefetch",
    "data.max_corrupt_share", "data.data_dir", "data.path", "data.eval_path", "data.eval_split", "data.mask.path",
    "optimizer.base_learning_rate", "optimizer.schedule", "optimizer.min_learning_rate", "optimizer.warmup_steps",
    "optimizer.betas", "optimizer.pretrained_scale",
    "loss.perceptual_weight", "loss.kl_weight", "loss.codebook_weight", "loss.commitment_weight", "loss.gan_start",
    "loss.gan_weight",
)  # fmt: skip
_FIXED = ("run.seed", "run.train_encoder")


class _OtherRunError(ConfigError):
    """The run is sound, but of another configuration."""


def _check_resumable(stored: Config, current: Config) -> None:
    old, new = configs.flatten(stored), configs.flatten(current)
    changed = {n: f"{n}={new[n]!r} (there {old[n]!r})" for n in new if old[n] != new[n]}
    broken = [text for n, text in changed.items() if n in _FIXED or not n.startswith(_CHANGEABLE)]
    if broken:
        raise _OtherRunError(
            f"{current.run.directory} holds a run of another configuration: {', '.join(broken)}; "
            "restore these values, or choose another run.directory"
        )
    if changed:
        log.info("resuming with changed fields: %s", ", ".join(changed.values()))
