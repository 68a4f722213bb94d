"""The training loop: everything around the pure step (clock, logs, pictures, checkpoints, signals)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from asymvq_jax.config import Config, ModelConfig, changed
from asymvq_jax.convert.reading import read_model
from asymvq_jax.data import pipeline
from asymvq_jax.data.identity import digest_arrays
from asymvq_jax.devices import cluster, sharding
from asymvq_jax.devices.chips import peak_flops
from asymvq_jax.devices.compilation import compiled
from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.devices.waiting import Watch
from asymvq_jax.errors import (
    CheckpointError,
    ConfigError,
    ExitCode,
    LostPeerError,
    NonFiniteError,
    OutputError,
    UnansweredError,
    UserError,
    first_line,
)
from asymvq_jax.files import images
from asymvq_jax.files.threads import quiet_threads
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.parameters import Params, all_finite, jitted, merge, split
from asymvq_jax.training.checkpoints import Resumed, RunCheckpoints, owned
from asymvq_jax.training.clock import KINDS, Clock, StepTimes
from asymvq_jax.training.fitting import fit_condition
from asymvq_jax.training.logs import RunLog
from asymvq_jax.training.optimizer import autoencoder_schedule
from asymvq_jax.training.profiling import Profile
from asymvq_jax.training.signals import stop_requests
from asymvq_jax.training.state import (
    Blueprint,
    TrainState,
    abstract_state,
    create_state,
    is_trained,
    make_blueprint,
    place,
    starting_parameters,
)
from asymvq_jax.training.step import Batch, Metrics, compiled_evaluation, compiled_step

log = logging.getLogger(__name__)

PICTURES = 8
# The frozen encoder's name among the identities of the inputs.
ENCODER = "frozen encoder"


def train(config: Config) -> ExitCode:
    """Trains until run.steps, resuming what run.directory holds.

    Returns:
        DONE, SAVED after SIGTERM, or INTERRUPTED after Ctrl-C; after all of them the last step is saved.

    Raises:
        ConfigError, CheckpointError, DataError, OutputError: before anything expensive starts; the latter also where
            another run is writing run.directory.
        ConfigError: the devices' memory does not suffice.
        CheckpointError, OutputError: run.directory cannot be written to any more; what it holds is kept.
        UnansweredError: the bucket's service does not answer; what run.directory holds is kept.
        NonFiniteError: the run diverged; the last good checkpoint is kept.
        LostPeerError: another process has ended; the last complete checkpoint is kept.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    advice = f"start all processes again to resume from the last checkpoint in {config.run.directory}"
    try:
        with quiet_threads(), Watch(config.run.wait_limit, advice) as watch, ExitStack() as held:
            with watch.waiting("the start of all processes"):
                held.enter_context(owned(config))
            ask = held.enter_context(stop_requests())
            run = held.enter_context(Run(config, mesh, watch))
            held.enter_context(jax.set_mesh(mesh))
            return run.to_the_end(ask)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ConfigError(
                f"data.batch_size={config.data.batch_size} needs more memory than the devices have: "
                f"{first_line(error).rstrip('.')}. Raise --optimizer.accumulate or --mesh.fsdp, set "
                "--model.remat=true, or lower --data.batch_size; asymvq plan prints what each needs"
            ) from error
        if jax.process_count() == 1:
            raise
        raise LostPeerError(
            f"a computation of all processes failed: {first_line(error)}. If another process has ended, its "
            f"log says why; start all of them again to resume from the last checkpoint in {config.run.directory}"
        ) from error
    except (OSError, ImportError) as error:
        # Of a place that nothing above names better.
        raise OutputError(
            f"the run cannot go on: {first_line(error)}; start again to resume from the last checkpoint in "
            f"{config.run.directory}"
        ) from error


class Run:
    """One training run on one process: its data, its state, and what it writes. A context manager."""

    def __init__(self, config: Config, mesh: Mesh, watch: Watch) -> None:
        self.config = config
        self.mesh = mesh
        self.watch = watch
        self.clock, self._times = Clock(), StepTimes()
        # What is quick to refuse, before a large data set is listed.
        with watch.waiting("the list of checkpoints"):
            self.saved = RunCheckpoints(config)
        self.identities: dict[str, str] = {}
        initial = self._first_stage()
        self.schedule = autoencoder_schedule(config)
        self.blueprint = make_blueprint(config)
        self.perceptual: Params = {}
        if self.blueprint.lpips is not None:
            _, weights = split(load_lpips("vgg16", config.loss.perceptual_weights))
            self.perceptual = jax.tree.map(place, weights, sharding.state_sharding(weights, mesh))
            self.identities["LPIPS weights"] = f"digest {digest_arrays(weights)}"

        directory = epath.Path(config.run.directory)
        inputs = pipeline.open_inputs(config.data, kept=directory, once=cluster.from_first)
        self.identities |= {name: str(each) for name, each in inputs.identities(config.data).items()}
        self.skipped = pipeline.SkippedFiles(inputs.train, config.data.max_corrupt_share)
        part, parts = sharding.part_of_batch(mesh)
        self.batches = pipeline.training_batches(
            config.data, config.run.seed, process_index=part, process_count=parts, inputs=inputs
        )
        self.held_out = self._held_out(inputs)
        if initial is not None and not config.run.train_encoder:
            frozen = {n: x for n, x in initial[1].items() if not is_trained(config, n)}
            self.identities[ENCODER] = f"digest {digest_arrays(frozen)}"
        self.state = self._start(initial)
        self.plain: Autoencoder | None = None
        if initial is not None and not config.run.train_encoder:
            source_config, params = initial
            copies = {name: place(value, sharding.replicated(mesh)) for name, value in params.items()}
            self.plain = merge(structure(source_config)[0], copies)
        self.log = RunLog(directory, step=self.step, steps=config.run.steps, active=jax.process_index() == 0)
        # What earlier starts did after that checkpoint is done again.
        self.clock.spent["lost"] += max(0.0, self.log.last_seconds - self._seconds_saved)
        self._profile = Profile(config.run.profile_steps, directory / "tensorboard")
        self._evaluate = compiled_evaluation(self.blueprint, mesh, PICTURES)
        # Of a step, without recomputation, as a share of what all devices can do in a second; where that is known.
        self._work: float | None = None
        self._compiled: set[str] = set()
        # Of the step, by whether the discriminator takes part.
        self._programs: dict[bool, jax.stages.Compiled] = {}
        self._plain_decode = jitted(_plain_decode, out_shardings=sharding.replicated(mesh))
        self._describe(len(inputs.train))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last checkpoint and ends the logs."""
        if kind is not None:
            self.watch.fails()
        if kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            # A checkpoint in writing waits for all processes, and one of them may be gone.
            return
        try:
            self._times.close()
            self._profile.close()
            failed = kind is not None and issubclass(kind, (CheckpointError, UnansweredError))
            if not failed or jax.process_count() == 1:
                with self.watch.waiting("the last checkpoint to be written"):
                    self.saved.close(together=kind is None)
        finally:
            self.log.close()

    @property
    def step(self) -> int:
        """Steps done."""
        return int(jax.device_get(self.state.step))

    def _first_stage(self) -> tuple[ModelConfig, Params] | None:
        """What run.init_from holds; a run that has a checkpoint can do without."""
        path = self.config.run.init_from
        if not path:
            return None
        try:
            model = read_model(path)
            return model.config, split(model)[1]
        except UserError as error:
            if self.saved.latest_step() is None:
                hint = "; `asymvq convert` has this option, and writes what a run begins with"
                hint = hint if "--scaling-factor" in str(error) else ""
                raise ConfigError(f"run.init_from={path!r}: {error}{hint}") from None
            log.warning(
                "run.init_from=%r cannot be read (%s), and is not needed to resume; the pictures lack the column "
                "'plain decode'", path, error,
            )  # fmt: skip
            return None

    def _start(self, initial: tuple[ModelConfig, Params] | None) -> TrainState:
        """The state to begin with: the last checkpoint's if there is one."""
        self._seconds_saved = 0.0
        with self.watch.waiting("the last checkpoint to be read"), self.clock.spending("restore"):
            resumed = self.saved.resume(abstract_state(self.blueprint, self.mesh), self._continue)
        if resumed is None:
            taken = starting_parameters(self.config, *initial) if initial else None
            return self._fitted(create_state(self.blueprint, self.mesh, taken))
        step = int(jax.device_get(resumed.state.step))
        log.info("resuming %s at step %d", self.config.run.directory, step)
        self._compare(resumed)
        self._seconds_saved = float(resumed.progress["seconds"])
        # Releases before 0.2 wrote the sum alone.
        self.clock.continues(resumed.progress.get("spent") or {"steps": self._seconds_saved})
        return resumed.state

    def _fitted(self, state: TrainState) -> TrainState:
        """The state with the condition branch of run.fit_condition."""
        count = self.config.run.fit_condition
        if not (count and self.config.model.condition):
            return state
        with jax.set_mesh(self.mesh):
            fitted = fit_condition(self.blueprint, state, self._next_batch, count)
        places = sharding.state_sharding(state.params, self.mesh)
        params = state.params | {n: place(x, places[n]) for n, x in fitted.items()}
        return state._replace(params=params, ema=jax.tree.map(lambda x: x.copy(), params) if state.ema else {})

    def _continue(self, resumed: Resumed) -> None:
        """Takes the data up where a step left them; raises where its position is damaged."""
        progress = resumed.progress
        if not (isinstance(progress["iterator"], dict) and math.isfinite(progress["seconds"])):
            raise ValueError("its item 'progress' is damaged")
        self.batches.set_state(progress["iterator"])

    def _compare(self, resumed: Resumed) -> None:
        """Says what differs from the run so far, of the inputs and of the schedule.

        Raises:
            CheckpointError: the frozen encoder is another one.
        """
        run, step = self.config.run, int(jax.device_get(resumed.state.step))
        before: dict[str, str] = resumed.progress.get("inputs") or {}
        changed = {n: old for n, old in before.items() if n in self.identities and self.identities[n] != old}
        if ENCODER in changed:
            raise CheckpointError(
                f"run.init_from={run.init_from!r} holds another encoder ({self.identities[ENCODER]}) than the one that "
                f"{run.directory} was trained with ({changed[ENCODER]}), which cannot change; "
                "restore run.init_from, or choose another run.directory"
            )
        for name, old in changed.items():
            log.warning(
                "the %s have changed: %s now, %s when step %d was saved; batches or held-out figures now differ from "
                "those of a run without the change", name, self.identities[name], old, step,
            )  # fmt: skip
        # What is not there now, such as the frozen encoder, stays known.
        self.identities = before | self.identities
        then, now = (float(schedule(step)) for schedule in (autoencoder_schedule(resumed.config), self.schedule))
        if not math.isclose(then, now, rel_tol=1e-3):
            log.warning(
                "the learning rate of the next step is %.3g, where the run so far would have had %.3g: run.steps=%d "
                "(there %d) or other fields of the schedule have changed",
                now, then, run.steps, resumed.config.run.steps,
            )  # fmt: skip

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
            "%s pictures (%s), %d devices (%s), batch %d; %.1f M parameters trained, %.1f M frozen; "
            "config:%s\n  (the rest are the defaults; each checkpoint has all)",
            pictures,
            c.data.source,
            jax.device_count(),
            ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items()),
            c.data.batch_size,
            count["trained"] / 1e6,
            count["frozen"] / 1e6,
            "".join(f"\n  {name} = {value!r}" for name, value in changed(c).items()),
        )

    def to_the_end(self, ask: Callable[[], ExitCode | None]) -> ExitCode:
        """Runs the remaining steps.

        `ask` is called before each; where it returns an exit code, the run saves, stops and returns that code.
        """
        c = self.config.run
        step = self.step
        self.clock.begin()
        pending: list[Metrics] = []
        while step < c.steps:
            with self.watch.waiting(f"the processes at step {step}"):
                code = ask()
            if code is not None:
                self._report(step, pending)
                self._check_good(step, {})
                self._save(None)
                log.info("asked to stop: saved step %d; start again to resume", step)
                return code
            with self.clock.spending("input"):
                batch = self._next_batch()
            adversarial = 0 <= self.config.loss.gan_start <= step
            self._profile.at(step, self.state)
            with self._first_call(f"step {adversarial}") as first:
                if first:
                    self._programs[adversarial] = self._compile(batch, adversarial)
                # The first call waits for the others to compile, which takes as long as it takes.
                limited = nullcontext() if first else self.watch.waiting(f"step {step + 1}")
                with (
                    limited,
                    jax.transfer_guard("disallow"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step + 1),
                ):
                    self.state, metrics = self._programs[adversarial](self.state, self.perceptual, batch)
            step += 1
            self._times.add(metrics)
            pending.append(metrics)
            self.log.progress(step)
            evaluate = step % c.eval_every == 0 or step == c.steps
            if evaluate or step % c.log_every == 0:
                self._report(step, pending)
                pending = []
            if evaluate:
                with self.clock.spending("evaluate"):
                    held_out = self._validate(step)
                    self._check_good(step, held_out)
                self._save(held_out)
        self._profile.at(step, self.state)
        return ExitCode.DONE

    @contextmanager
    def _first_call(self, program: str) -> Iterator[bool]:
        """Charges the time inside to compilation, where the program has not been called before; yields whether."""
        first = program not in self._compiled
        self._compiled.add(program)
        with self.clock.spending("compile") if first else nullcontext():
            yield first

    def _compile(self, batch: Batch, adversarial: bool) -> jax.stages.Compiled:
        """The step's program; also counts its work."""

        def trace(blueprint: Blueprint) -> jax.stages.Traced:
            step = compiled_step(blueprint, self.state, self.mesh)
            return step.trace(self.state, self.perceptual, batch, adversarial=adversarial)

        traced = trace(self.blueprint)
        if (peak := peak_flops(jax.devices()[0].device_kind)) is not None:
            counted = traced
            if self.config.model.remat:
                model = dataclasses.replace(self.config.model, remat=False)
                counted = trace(make_blueprint(dataclasses.replace(self.config, model=model)))
            self._work = matmul_flops(counted.jaxpr) / (peak * self.mesh.size)
        return compiled(traced)

    def _check_good(self, step: int, held_out: dict[str, float]) -> None:
        """Stops the run before it saves a step that has diverged: one whose figures or whose state are not finite."""
        bad = [f"held-out {name}" for name, value in held_out.items() if not math.isfinite(value)]
        if not bool(all_finite(self.state)):
            bad.append("parameters")
        if bad:
            self._stop_diverged(step, bad)

    def _stop_diverged(self, step: int, bad: list[str]) -> NoReturn:
        last = self.saved.latest_step()
        kept = f"the last good checkpoint is step {last}" if last is not None else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)} not finite; {kept} in {self.config.run.directory}. "
            "Lower --optimizer.base_learning_rate, or begin again with a longer --optimizer.warmup_steps"
        )

    def _next_batch(self) -> Batch:
        batch = next(self.batches)
        self.skipped.update(batch["skipped"], batch["small"])
        split_over = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(split_over, batch[name]) for name in ("image", "mask")}

    def _report(self, step: int, pending: list[Metrics]) -> None:
        """Logs the means since the last report; stops the run where one of them is not finite, or a write failed."""
        with self.watch.waiting(f"the results of step {step}"):
            self.saved.check()
            values = jax.device_get(pending)
        if not pending:
            return
        first = step - len(values) + 1
        for at, metrics in enumerate(values, first):
            bad = [name for name, value in metrics.items() if not np.isfinite(value)]
            if bad:
                self._stop_diverged(at, bad)
        means = {name: float(np.mean([m[name] for m in values if name in m])) for name in values[-1]}
        lap = self.clock.lap(len(values))
        remaining = (self.config.run.steps - step) / lap.steps_per_second
        per_second = lap.steps_per_second * self.config.data.batch_size
        rate = float(self.schedule(step - 1))
        note = ", ".join(
            f"{n} {means[n]:.4g}" for n in ("l1", "lpips", "adaptive_weight", "discriminator") if n in means
        )
        self.log.metrics(
            step,
            {
                **means,
                "learning_rate": rate,
                "images_per_second": per_second,
                "input_wait_share": lap.waiting,
                **{f"step_seconds/{name}": value for name, value in self._times.take().items()},
                **({} if self._work is None else {"mfu": lap.steps_per_second * self._work}),
                **_device_memory(),
                "goodput": self.clock.goodput,
                "seconds": lap.total,
            },
            f"step {step}/{self.config.run.steps}: {note}, learning rate {rate:.3g}; "
            f"{per_second:.1f} images/s, ETA {_hms(remaining)}, {lap.waiting:.0%} of the time waiting for input",
        )

    def _parameters(self) -> Params:
        return {**self.state.frozen, **self.state.params, **self.state.ema}

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out metrics, logged with a picture grid."""
        c = self.config
        size = c.data.batch_size // c.optimizer.accumulate
        split_over = sharding.batch_sharding(self.mesh)
        results: list[Metrics] = []
        first: tuple[jax.Array, jax.Array] | None = None
        for begin in range(0, len(self.held_out["image"]), size):
            batch = {name: place(x[begin : begin + size], split_over) for name, x in self.held_out.items()}
            with self._first_call("evaluation"):
                metrics, recon = self._evaluate(self._parameters(), self.perceptual, batch)
            results.append(metrics)
            first = first or (batch["image"], recon)
        means = {f"held_out/{k}": float(np.mean([r[k] for r in jax.device_get(results)])) for k in results[0]}
        note = ", ".join(f"{name.removeprefix('held_out/')} {value:.4g}" for name, value in means.items())
        seconds = self.clock.total
        shares = ", ".join(
            f"{kind} {s / seconds:.0%}" for kind in KINDS if (s := self.clock.spent[kind]) / seconds > 0.005
        )
        self.log.metrics(
            step,
            means | {f"spent/{kind}": self.clock.spent[kind] for kind in KINDS},
            f"step {step}: held out: {note}; time spent so far: {shares}",
        )
        if first is not None and all(map(math.isfinite, means.values())):
            self.log.picture(step, self._grid(first[0], np.asarray(first[1])))
        return {name.removeprefix("held_out/"): value for name, value in means.items()}

    def _grid(self, image: jax.Array, recon: np.ndarray) -> np.ndarray:
        """Pictures of the first held-out batch: `image` is that batch on the devices, `recon` its first few decoded."""
        first = {name: x[: len(recon)] for name, x in self.held_out.items()}
        original, ours = first["image"], images.to_uint8(recon)
        columns: list[tuple[str, Any]] = [("input", original)]
        if self.config.model.condition:
            columns.append(("masked", np.where(first["mask"] > 0, np.uint8(127), original)))
        if self.plain is not None:
            columns.append(("plain decode", images.to_uint8(self._plain_decode(self.plain, image))))
        columns.append(("asymmetric" if self.plain is not None else "decode", ours))
        errors = [images.error_map(a, b) for a, b in zip(ours, original, strict=True)]
        return images.grid([*columns, ("error x 4", errors)])

    def _save(self, metrics: dict[str, float] | None) -> None:
        progress = {"iterator": self.batches.get_state(), "seconds": self.clock.total, "inputs": self.identities}
        progress["spent"] = dict(self.clock.spent)
        self._times.add(None)
        with self.watch.waiting(f"the checkpoint of step {self.step}"), self.clock.spending("save"):
            self.saved.save(self.state, progress, metrics)
            self.log.flush()


def _plain_decode(model: Autoencoder, image: jax.Array) -> jax.Array:
    return model.decode(model.encode(images.to_float(image)).mode())[:PICTURES]


def _device_memory() -> dict[str, float]:
    """Bytes in use and their peak on this process's first device, where it reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {f"device_{name}": float(stats[name]) for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def _hms(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
