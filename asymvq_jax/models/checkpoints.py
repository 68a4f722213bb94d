"""A model on disk: what `convert` writes, and what a run's step holds of one. Writing is atomic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from asymvq_jax import config as configs
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import CheckpointError, OutputError, first_line
from asymvq_jax.files.addresses import bucket_errors, check_checkpoint_address, in_bucket
from asymvq_jax.files.threads import quiet_threads
from asymvq_jax.models.autoencoder import Autoencoder, structure
from asymvq_jax.models.embedded import Known, embedded_parameters, ignore, is_embedded
from asymvq_jax.models.parameters import Params, fingerprint, merge, split

STEPS = "checkpoints"
# Orbax's mark of a checkpoint in a bucket that is complete.
COMMITTED = "commit_success.txt"
# Among the JSON beside arrays: the fingerprint of each item that holds some.
FINGERPRINTS = "fingerprints"


def checkpoint_path(path: str | Path, field: str = "") -> epath.Path:
    """The absolute path of a checkpoint or run; `field` is how messages call it."""
    check_checkpoint_address(str(path), field)
    return epath.Path(path) if in_bucket(path) else epath.Path(path).absolute()


def save_model(path: str | Path, model: Autoencoder) -> None:
    """Writes a model checkpoint atomically.

    Raises:
        CheckpointError: `path` exists already; nothing is overwritten.
        OutputError: it cannot be written.
    """
    target = checkpoint_path(path)
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another target or remove it first")
    params = split(model)[1]
    stored = {"model": dataclasses.asdict(model.config), FINGERPRINTS: {"model": fingerprint(params)}}
    items = ocp.args.Composite(config=ocp.args.JsonSave(stored), model=ocp.args.StandardSave(params))
    with quiet_threads():
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(target, args=items)
        # Orbax's threads raise what TensorStore does, a ValueError where a disk is full; clients of buckets what else.
        except Exception as error:
            if not isinstance(error, OSError | ValueError | RuntimeError) and not in_bucket(target):
                raise
            full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
            reason = "No space left on device" if full else first_line(error)
            raise OutputError(f"{target} cannot be written: {reason}") from None


def load_model(path: str | Path, *, known: Known = ignore, **changes: Any) -> Autoencoder:
    """Reads the autoencoder of a run (its last step), of one step of a run, or of what `convert` wrote, or one that the
    package holds.

    Where the run kept a moving average of the parameters, that is what is read.

    Args:
        path: the checkpoint's directory, or a name in `asymvq_jax.models.embedded.MODELS`.
        known: called with the configuration before the arrays are read, for what can be done meanwhile.
        changes: fields of the model's configuration to replace, such as dtype="bfloat16".

    Raises:
        CheckpointError: no model checkpoint at `path`.
    """
    config, params = load_parameters(path, lambda config: known(dataclasses.replace(config, **changes)))
    return merge(structure(dataclasses.replace(config, **changes))[0], params)


def load_parameters(path: str | Path, known: Known = ignore) -> tuple[ModelConfig, Params]:
    """As `load_model`, but the configuration and the flat parameters, on the first local device."""
    if is_embedded(path):
        return embedded_parameters(str(path), known=known)
    step = find_step(path)
    try:
        return _read(step, known)
    except CannotReadError as error:
        raise CheckpointError(f"{error}; {_advice(step)}") from error


class CannotReadError(Exception):
    """A step of a run, or a model, that is damaged or of another version; the message names it and the reason."""


@contextmanager
def reading(step: epath.Path) -> Iterator[None]:
    """Turns any error in reading a step into a CannotReadError."""
    with quiet_threads():
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise ValueError, KeyError, OSError and others.
            # What TensorStore was asked for follows in brackets.
            reason = first_line(error).partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
            raise CannotReadError(f"{step} cannot be read: {reason}") from error


def _read(step: epath.Path, known: Known = ignore) -> tuple[ModelConfig, Params]:
    device = SingleDeviceSharding(jax.local_devices()[0])
    me = jax.process_index()
    # Each process reads by itself and does not wait for the others.
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    with reading(step), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        stored = checkpointer.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        config: ModelConfig = configs.from_dict(ModelConfig, stored["model"], "model.")
    # Outside of `reading`: what it refuses is not the files' fault.
    known(config)
    with reading(step), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        _, shapes = structure(config)
        abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=device) for k, v in shapes.items()}
        items = {"model": ocp.args.StandardRestore(abstract)}
        if (step / "ema").exists():
            with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
                averaged = reader.metadata(step / "ema").item_metadata.tree
            items["ema"] = ocp.args.StandardRestore({k: abstract[k] for k in averaged})
        if (step / "progress").exists():
            items["progress"] = ocp.args.JsonRestore()
        restored = checkpointer.restore(step, args=ocp.args.Composite(**items))
        arrays: dict[str, Any] = {name: restored[name] for name in ("model", "ema") if name in items}
        check_fingerprints(arrays, (restored.get("progress") or stored).get(FINGERPRINTS, {}))
    return config, {**restored["model"], **(restored.get("ema") or {})}


def check_fingerprints(arrays: dict[str, Any], stored: dict[str, int]) -> None:
    """Raises ValueError for an item whose numbers are not those that were written; older checkpoints say nothing."""
    for name, tree in arrays.items():
        if stored.get(name) not in (None, fingerprint(tree)):
            raise ValueError(f"the numbers in its item {name!r} are not those that were written")


def _advice(step: epath.Path) -> str:
    """What to do where a step cannot be read."""
    if not step.name.isdecimal():
        return "copy or convert it again"
    for other in reversed(steps_in(step.parent)):
        if int(other.name) < int(step.name):
            try:
                _read(other)
            except CannotReadError:
                continue
            return f"step {other.name} beside it can be read: name {other}"
    return "no earlier step beside it can be read"


def steps_in(folder: epath.Path) -> list[epath.Path]:
    """The finished steps of a run, which lie in a folder, from the first to the last."""
    if not folder.is_dir():
        return []
    steps = (p for p in folder.iterdir() if p.name.isdecimal() and _is_finished(p))
    return sorted(steps, key=lambda p: int(p.name))


def _is_finished(checkpoint: epath.Path) -> bool:
    """Whether all of a checkpoint was written: it has its name only then, but in Google's buckets, where Orbax adds a
    file at the end."""
    return not str(checkpoint).startswith("gs://") or bool((checkpoint / COMMITTED).exists())


def find_step(path: str | Path) -> epath.Path:
    """The directory that holds the items `config` and `model`: `path` itself, or its last step if it is a run."""
    root = checkpoint_path(path)
    try:
        with bucket_errors(root):
            return _find_step(root, path)
    except OSError as error:
        raise CheckpointError(f"no checkpoint can be read at {path}: {first_line(error)}") from None


def _find_step(root: epath.Path, path: str | Path) -> epath.Path:
    if root.is_file() or (root / "config.json").exists() or (root / "model_index.json").exists():
        raise CheckpointError(
            f"{path} is not a checkpoint of this package, but another program's weights; convert it first: "
            f"asymvq convert {path} TARGET (in Python: asymvq_jax.convert), and name TARGET"
        )
    if not root.is_dir():
        raise CheckpointError(
            f"no checkpoint at {path}: expected a run's directory, one of its steps, or what `asymvq convert` wrote"
        )
    for parent in (root / STEPS, root):
        if steps := steps_in(parent):
            return steps[-1]
    if (root / "model").is_dir() and (root / "config").is_dir() and _is_finished(root):
        return root
    raise CheckpointError(
        f"{path} holds no model checkpoint (no finished step, and no items 'model' and 'config'); expected a run's "
        "directory, one of its steps, or what `asymvq convert` wrote"
    )
