"""The training loop: everything around the pure step (clock, logs, pictures, checkpoints, signals)."""

from __future__ import annotations

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

from asymvq_jax import checkpoints, images, sharding
from asymvq_jax.checkpoints import RunCheckpoints
from asymvq_jax.config import Config, to_json
from asymvq_jax.data import pipeline
from asymvq_jax.data.sources import open_source
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import Params, merge, split
from asymvq_jax.training.logs import RunLog
from asymvq_jax.training.state import TrainState, build_networks, create_state, starting_parameters
from asymvq_jax.training.step import Batch, Metrics, eval_step, train_step

log = logging.getLogger(__name__)

# "Temporary failure, try again" in sysexits.h: the run was told to stop, has saved, and resumes when started again.
EXIT_PREEMPTED = 75
PICTURES = 8


class NonFiniteError(RuntimeError):
    """A metric became NaN or infinite; the message names the step and the checkpoint to go back to."""


def train(config: Config) -> int:
    """Trains until run.steps, resuming what run.directory holds.

    Returns:
        The process's exit code: 0 when done, EXIT_PREEMPTED after SIGTERM.

    Raises:
        ConfigError, CheckpointError, DataError: before anything expensive starts.
        NonFiniteError: the run diverged; the last good checkpoint is kept.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    with _sigterm() as told_to_stop:
        run = Run(config, mesh)
        try:
            with jax.set_mesh(mesh):
                return run.to_the_end(told_to_stop)
        finally:
            run.close()


class Run:
    """One training run on one process: its data, its state, and what it writes."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        source = open_source(config.data, train=True)
        self.corrupt = pipeline.CorruptFiles(source, config.data.max_corrupt_share)
        self.batches = pipeline.training_batches(
            config.data, config.run.seed, process_index=jax.process_index(), process_count=jax.process_count()
        )
        self.held_out = self._held_out()
        self.saved = RunCheckpoints(config)
        initial = checkpoints.load_parameters(config.run.init_from) if config.run.init_from else None

        self.networks = build_networks(config)
        self.perceptual: Params = {}
        if self.networks.lpips is not None:
            _, weights = split(load_lpips("vgg16", config.loss.perceptual_weights))
            self.perceptual = jax.device_put(weights, sharding.state_sharding(weights, mesh))
        self.state, self.seconds = self._start(starting_parameters(config, *initial) if initial else None)
        self.plain: Autoencoder | None = None
        if initial and not config.run.train_encoder:
            source_config, params = initial
            self.plain = merge(structure(source_config)[0], jax.device_put(params, sharding.replicated(mesh)))
        self.log = RunLog(
            epath.Path(config.run.directory), step=self.step, steps=config.run.steps, active=jax.process_index() == 0
        )
        self._step = jax.jit(
            partial(train_step, networks=self.networks),
            static_argnames="adversarial",
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, self.state), sharding.replicated(mesh)),
        )
        self._evaluate = jax.jit(
            partial(eval_step, networks=self.networks, pictures=PICTURES), out_shardings=sharding.replicated(mesh)
        )
        self._describe(len(source))

    @property
    def step(self) -> int:
        """Steps done."""
        return int(jax.device_get(self.state.step))

    def _start(self, taken: Params | None) -> tuple[TrainState, float]:
        """The state to begin with: the last checkpoint's if there is one."""
        state = create_state(self.networks, self.mesh, taken)
        step = self.saved.latest_step()
        if step is None:
            return state, 0.0
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state, progress = self.saved.restore(step, abstract)
        self.batches.set_state(progress["iterator"])
        log.info("resuming %s at step %d", self.config.run.directory, step)
        return state, progress["seconds"]

    def _held_out(self) -> Batch:
        """This process's share of the held-out pictures, a whole number of batches of them."""
        c = self.config
        size = c.data.batch_size // c.optimizer.accumulate
        count = math.ceil(c.run.eval_pictures / size) * size
        pictures = pipeline.held_out(c.data, count, c.run.seed)
        return {name: pictures[name][jax.process_index() :: jax.process_count()] for name in ("image", "mask")}

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

    def to_the_end(self, told_to_stop: Callable[[int], bool]) -> int:
        """Runs the remaining steps, asking `told_to_stop` before each; returns the exit code (see `train`)."""
        c = self.config.run
        step, clock = self.step, _Clock(self.seconds)
        pending: list[Metrics] = []
        while step < c.steps:
            if told_to_stop(step):
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

    def close(self) -> None:
        """Waits for the last checkpoint and ends the logs."""
        self.saved.close()
        self.log.close()

    def _next_batch(self) -> Batch:
        batch = next(self.batches)
        self.corrupt.update(batch["skipped"], len(batch["image"]))
        return self._to_device(batch)

    def _to_device(self, batch: dict[str, np.ndarray]) -> Batch:
        place = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(place, batch[name]) for name in ("image", "mask")}

    def _report(self, step: int, pending: list[Metrics], clock: _Clock) -> None:
        """Logs the means since the last report; stops the run where one of them is not finite."""
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
        size = c.data.batch_size // c.optimizer.accumulate // jax.process_count()
        slices = [slice(i, i + size) for i in range(0, len(self.held_out["image"]), size)]
        results, pictures = [], None
        for part in slices:
            batch = self._to_device({name: value[part] for name, value in self.held_out.items()})
            metrics, recon = self._evaluate(self._parameters(), self.perceptual, batch)
            results.append(metrics)
            if pictures is None:
                first = {name: multihost_utils.process_allgather(v, tiled=True) for name, v in batch.items()}
                pictures = self._grid({n: np.asarray(v)[:PICTURES] for n, v in first.items()}, np.asarray(recon))
        means = {f"held_out/{k}": float(np.mean([r[k] for r in jax.device_get(results)])) for k in results[0]}
        note = ", ".join(f"{name.removeprefix('held_out/')} {value:.4g}" for name, value in means.items())
        self.log.metrics(step, means, f"step {step}: held out: {note}")
        self.log.picture(step, pictures)
        return {name.removeprefix("held_out/"): value for name, value in means.items()}

    def _grid(self, batch: dict[str, np.ndarray], recon: np.ndarray) -> np.ndarray:
        original, ours = batch["image"], images.to_uint8(recon)
        columns = [("input", original)]
        if self.config.model.condition:
            columns.append(("masked", np.where(batch["mask"] > 0, np.uint8(127), original)))
        if self.plain is not None:
            columns.append(("plain decode", images.to_uint8(_plain_decode(self.plain, images.to_float(original)))))
        columns.append(("asymmetric" if self.plain is not None else "decode", ours))
        errors = [images.error_map(a, b) for a, b in zip(ours, original, strict=True)]
        return images.grid([*columns, ("error x 4", errors)])

    def _save(self, clock: _Clock, metrics: dict[str, float] | None) -> None:
        self.saved.save(self.state, {"iterator": self.batches.get_state(), "seconds": clock.total}, metrics)
        self.log.flush()


@nnx.jit
def _plain_decode(model: Autoencoder, image: jax.Array) -> jax.Array:
    return model.decode(model.encode(image).mode())


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
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that says whether the run is to stop, the same on every process."""
    if jax.process_count() > 1:
        # jax.distributed catches SIGTERM itself and agrees with all processes on the step.
        yield multihost_utils.reached_preemption_sync_point
        return
    told: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield lambda _: bool(told)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _hms(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
