"""The training loop: everything around the pure step (clock, logs, pictures, checkpoints, signals)."""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from asymvq_jax.config import Config, to_json
from asymvq_jax.data import pipeline
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConfigError, LostPeerError, NonFiniteError
from asymvq_jax.files import images
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.checkpoints import load_parameters
from asymvq_jax.models.parameters import Params, merge, split
from asymvq_jax.training.checkpoints import RunCheckpoints
from asymvq_jax.training.logs import RunLog
from asymvq_jax.training.state import (
    TrainState,
    abstract_state,
    build_networks,
    create_state,
    place,
    starting_parameters,
)
from asymvq_jax.training.step import Batch, Metrics, compiled_step, eval_step

log = logging.getLogger(__name__)

# "Temporary failure, try again" in sysexits.h: the run was told to stop, has saved, and resumes when started again.
EXIT_PREEMPTED = 75
# "Remote error": another process of the run has ended; the run resumes when all of them are started again.
EXIT_LOST_PEER = 76
PICTURES = 8


def train(config: Config) -> int:
    """Trains until run.steps, resuming what run.directory holds.

    Returns:
        The process's exit code: 0 when done, EXIT_PREEMPTED after SIGTERM.

    Raises:
        ConfigError, CheckpointError, DataError: before anything expensive starts.
        ConfigError: the devices' memory does not suffice.
        CheckpointError, OutputError: run.directory cannot be written to any more; what it holds is kept.
        NonFiniteError: the run diverged; the last good checkpoint is kept.
        LostPeerError: another process has ended; the last complete checkpoint is kept.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    try:
        with _sigterm() as told_to_stop, Run(config, mesh) as run, jax.set_mesh(mesh):
            return run.to_the_end(told_to_stop)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ConfigError(
                f"data.batch_size={config.data.batch_size} needs more memory than the devices have: "
                f"{str(error).splitlines()[0].rstrip('.')}. Raise --optimizer.accumulate or --mesh.fsdp, set "
                "--model.remat=true, or lower --data.batch_size; python -m asymvq_jax.plan tells what each needs"
            ) from error
        if jax.process_count() == 1:
            raise
        raise LostPeerError(
            f"a computation of all processes failed: {str(error).splitlines()[0]}. If another process has ended, its "
            f"log says why; start all of them again to resume from the last checkpoint in {config.run.directory}"
        ) from error


class Run:
    """One training run on one process: its data, its state, and what it writes. A context manager."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        inputs = pipeline.open_inputs(config.data)
        self.skipped = pipeline.SkippedFiles(inputs.train, config.data.max_corrupt_share)
        part, parts = _share(mesh)
        self.batches = pipeline.training_batches(
            config.data, config.run.seed, process_index=part, process_count=parts, inputs=inputs
        )
        self.held_out = self._held_out(inputs)
        self.saved = RunCheckpoints(config)
        initial = load_parameters(config.run.init_from) if config.run.init_from else None

        self.networks = build_networks(config)
        self.perceptual: Params = {}
        if self.networks.lpips is not None:
            _, weights = split(load_lpips("vgg16", config.loss.perceptual_weights))
            self.perceptual = jax.tree.map(place, weights, sharding.state_sharding(weights, mesh))
        self.state, self.seconds = self._start(starting_parameters(config, *initial) if initial else None)
        self.plain: Autoencoder | None = None
        if initial and not config.run.train_encoder:
            source_config, params = initial
            copies = {name: place(value, sharding.replicated(mesh)) for name, value in params.items()}
            self.plain = merge(structure(source_config)[0], copies)
        self.log = RunLog(
            epath.Path(config.run.directory), step=self.step, steps=config.run.steps, active=jax.process_index() == 0
        )
        self._step = compiled_step(self.networks, self.state, mesh)
        self._evaluate = jax.jit(
            partial(eval_step, networks=self.networks, pictures=PICTURES), out_shardings=sharding.replicated(mesh)
        )
        self._plain_decode = nnx.jit(_plain_decode, out_shardings=sharding.replicated(mesh))
        self._describe(len(inputs.train))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last checkpoint and ends the logs."""
        if kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            # A checkpoint in writing waits for all processes, and one of them may be gone.
            return
        try:
            self.saved.close()
        finally:
            self.log.close()

    @property
    def step(self) -> int:
        """Steps done."""
        return int(jax.device_get(self.state.step))

    def _start(self, taken: Params | None) -> tuple[TrainState, float]:
        """The state to begin with: the last checkpoint's if there is one."""
        step = self.saved.latest_step()
        if step is None:
            return create_state(self.networks, self.mesh, taken), 0.0
        state, progress = self.saved.restore(step, abstract_state(self.networks, self.mesh))
        self.batches.set_state(progress["iterator"])
        log.info("resuming %s at step %d", self.config.run.directory, step)
        return state, progress["seconds"]

    def _held_out(self, inputs: pipeline.Inputs) -> dict[str, np.ndarray]:
        """The held-out pictures, a whole number of batches of them; every process holds them all."""
        c = self.config
        size = c.data.batch_size // c.optimizer.accumulate
        count = math.ceil(c.run.eval_pictures / size) * size
        return pipeline.held_out(c.data, count, c.run.seed, inputs)

    def _describe(self, pictures: int) -> None:
        c = self.config
        count = {
            name: sum(math.prod(x.shape) for x in tree.values())
            for name, tree in (("trained", self.state.params), ("frozen", self.state.frozen))
        }
        log.info(
            "%s pictures (%s), %d devices (%s), batch %d; %.1f M parameters trained, %.1f M frozen; config:\n%s",
            pictures,
            c.data.source,
            jax.device_count(),
            ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items()),
            c.data.batch_size,
            count["trained"] / 1e6,
            count["frozen"] / 1e6,
            to_json(c),
        )

    def to_the_end(self, told_to_stop: Callable[[], bool]) -> int:
        """Runs the remaining steps, asking `told_to_stop` before each; returns the exit code (see `train`)."""
        c = self.config.run
        step, clock = self.step, _Clock(self.seconds)
        pending: list[Metrics] = []
        while step < c.steps:
            if told_to_stop():
                self._report(step, pending, clock)
                self._save(clock, None)
                log.info("told to stop: saved step %d; start again to resume", step)
                return EXIT_PREEMPTED
            with clock.waiting():
                batch = self._next_batch()
            adversarial = 0 <= self.config.loss.gan_start <= step
            with jax.transfer_guard("disallow"):
                self.state, metrics = self._step(self.state, self.perceptual, batch, adversarial=adversarial)
            step += 1
            pending.append(metrics)
            self.log.progress(step)
            evaluate = step % c.eval_every == 0 or step == c.steps
            if evaluate or step % c.log_every == 0:
                self._report(step, pending, clock)
                pending = []
            if evaluate:
                with clock.paused():
                    self._save(clock, self._validate(step))
        return 0

    def _next_batch(self) -> Batch:
        batch = next(self.batches)
        self.skipped.update(batch["skipped"], batch["small"])
        split_over = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(split_over, batch[name]) for name in ("image", "mask")}

    def _report(self, step: int, pending: list[Metrics], clock: _Clock) -> None:
        """Logs the means since the last report; stops the run where one of them is not finite, or a write failed."""
        self.saved.check()
        if not pending:
            return
        values = jax.device_get(pending)
        first = step - len(values) + 1
        for at, metrics in enumerate(values, first):
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            if bad:
                last = self.saved.latest_step()
                kept = f"the last good checkpoint is step {last}" if last is not None else "there is no checkpoint yet"
                raise NonFiniteError(f"step {at}: {', '.join(bad)} not finite; {kept} in {self.config.run.directory}")
        means = {name: float(np.mean([m[name] for m in values])) for name in values[-1]}
        speed, waiting = clock.lap(len(values))
        remaining = (self.config.run.steps - step) / speed
        per_second = speed * self.config.data.batch_size
        note = ", ".join(
            f"{n} {means[n]:.4g}" for n in ("l1", "lpips", "adaptive_weight", "discriminator") if n in means
        )
        self.log.metrics(
            step,
            {**means, "images_per_second": per_second, "input_wait_share": waiting, "seconds": clock.total},
            f"step {step}/{self.config.run.steps}: {note}; {per_second:.1f} images/s, ETA {_hms(remaining)}, "
            f"{waiting:.0%} of the time waiting for input",
        )

    def _parameters(self) -> Params:
        return {**self.state.frozen, **self.state.params, **self.state.ema}

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out metrics, logged with a picture grid."""
        c = self.config
        size = c.data.batch_size // c.optimizer.accumulate
        split_over = sharding.batch_sharding(self.mesh)
        results, pictures = [], None
        for begin in range(0, len(self.held_out["image"]), size):
            batch = {name: place(x[begin : begin + size], split_over) for name, x in self.held_out.items()}
            metrics, recon = self._evaluate(self._parameters(), self.perceptual, batch)
            results.append(metrics)
            if pictures is None:
                pictures = self._grid(batch["image"], np.asarray(recon))
        means = {f"held_out/{k}": float(np.mean([r[k] for r in jax.device_get(results)])) for k in results[0]}
        note = ", ".join(f"{name.removeprefix('held_out/')} {value:.4g}" for name, value in means.items())
        self.log.metrics(step, means, f"step {step}: held out: {note}")
        self.log.picture(step, pictures)
        return {name.removeprefix("held_out/"): value for name, value in means.items()}

    def _grid(self, image: jax.Array, recon: np.ndarray) -> np.ndarray:
        """Pictures of the first held-out batch: `image` is that batch on the devices, `recon` its first few decoded."""
        first = {name: x[: len(recon)] for name, x in self.held_out.items()}
        original, ours = first["image"], images.to_uint8(recon)
        columns = [("input", original)]
        if self.config.model.condition:
            columns.append(("masked", np.where(first["mask"] > 0, np.uint8(127), original)))
        if self.plain is not None:
            columns.append(("plain decode", images.to_uint8(self._plain_decode(self.plain, image))))
        columns.append(("asymmetric" if self.plain is not None else "decode", ours))
        errors = [images.error_map(a, b) for a, b in zip(ours, original, strict=True)]
        return images.grid([*columns, ("error x 4", errors)])

    def _save(self, clock: _Clock, metrics: dict[str, float] | None) -> None:
        self.saved.save(self.state, {"iterator": self.batches.get_state(), "seconds": clock.total}, metrics)
        self.log.flush()


def _plain_decode(model: Autoencoder, image: jax.Array) -> jax.Array:
    return model.decode(model.encode(images.to_float(image)).mode())[:PICTURES]


def _share(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of every batch this process's devices hold.

    Processes along the tensor axis hold the same part.

    Raises:
        ConfigError: the parts of two processes overlap, but are not the same.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    for device, (row,) in sharding.batch_sharding(mesh).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    parts = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, parts)) != ways:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']}: expected a divisor or a multiple of the "
            f"{jax.local_device_count()} devices of a process"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


class _Clock:
    """Elapsed time over all of the run's starts; speed and share of waiting since the last lap."""

    def __init__(self, seconds: float) -> None:
        self._before = seconds
        self._begin = self._lap = time.perf_counter()
        self._waited = 0.0

    @property
    def total(self) -> float:
        """Seconds since the run's first start, without the time between its starts."""
        return self._before + time.perf_counter() - self._begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the lap."""
        begin = time.perf_counter()
        yield
        self._lap += time.perf_counter() - begin

    def lap(self, steps: int) -> tuple[float, float]:
        """Steps per second and the share of waiting since the last call."""
        now = time.perf_counter()
        spent, waited = max(now - self._lap, 1e-9), self._waited
        self._lap, self._waited = now, 0.0
        return steps / spent, waited / spent


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function, to be called before each step, that says on all processes alike whether the run is to stop."""
    if jax.process_count() > 1:
        # jax.distributed catches SIGTERM itself and agrees with all processes on a call to come. Calls are counted from
        # this start: with the step number, a signal before a resumed run's first call would name a call long past.
        calls = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    told: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _hms(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
