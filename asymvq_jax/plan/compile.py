"""Compiles the programs of a run for a target, and keeps what it learns about them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from asymvq_jax.config import Config, MeshConfig
from asymvq_jax.devices import sharding
from asymvq_jax.devices.flops import matmul_flops, needed
from asymvq_jax.diffusion.denoising import Batch, denoise
from asymvq_jax.diffusion.schedulers import SchedulerConfig
from asymvq_jax.diffusion.solvers import make_solver
from asymvq_jax.diffusion.unet import SIZES, Added, UNet, UNetConfig
from asymvq_jax.errors import InputError
from asymvq_jax.files.outputs import write_bytes
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.parameters import Params, merge, seeded, split
from asymvq_jax.plan.chips import Target
from asymvq_jax.plan.counting import Collective, collectives
from asymvq_jax.plan.parts import Part, step_parts
from asymvq_jax.training.state import abstract_state, make_blueprint
from asymvq_jax.training.step import compiled_step

log = logging.getLogger(__name__)

# Part of the key of kept results; to be raised whenever Program or how it is counted changes.
VERSION = 3


@dataclass(frozen=True)
class Memory:
    """What a program holds in one chip's memory, bytes."""

    # Arguments by their shapes: parameters (the model's, trained and frozen, and the discriminator's) and the
    # optimizers' state.
    parameters: int
    optimizer: int
    # The other arguments: LPIPS, the moving average, the batch, and what the layouts of all arguments pad.
    other: int
    # All that exists only while the program runs, results included that do not take an argument's place.
    temporaries: int
    # The program's own instructions.
    code: int

    @property
    def peak(self) -> int:
        """The sum."""
        return self.parameters + self.optimizer + self.other + self.temporaries + self.code


@dataclass(frozen=True)
class Program:
    """What one program needs on one chip in one run."""

    memory: Memory
    # What the compiler had, bytes, where the program needs more and was not compiled; None where it was.
    exceeded: int | None
    # FLOPs of convolutions and matrix products, counted from their shapes: all, and without those that `remat` repeats.
    flops: float
    model_flops: float
    # The compiler's count of all FLOPs, and of bytes to and from memory; None where it was not compiled.
    compiler_flops: float | None
    moved: float | None
    collectives: tuple[Collective, ...]
    compile_seconds: float
    # Of a training step: where its FLOPs go.
    parts: tuple[Part, ...] = ()

    @property
    def plausible(self) -> bool:
        """Whether the compiler's FLOPs are those of the shapes, within a tenth."""
        return self.compiler_flops is not None and abs(self.compiler_flops / self.flops - 1) < 0.1


@dataclass(frozen=True)
class _Lowered:
    """A program before compilation; bytes of its arguments and FLOPs on one chip."""

    name: str
    lowered: jax.stages.Lowered
    mesh: Mesh
    parameters: int
    optimizer: int
    arguments: int
    flops: float
    model_flops: float


def ways(config: Config, target: Target) -> int:
    """Over how many chips the batch is split."""
    shape = sharding.make_mesh(config.mesh, target.devices).shape
    return math.prod(shape[axis] for axis in sharding.BATCH_AXES)


def with_batch(config: Config, batch_size: int) -> Config:
    """The config with another global batch."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))


def plan_step(config: Config, target: Target) -> Program:
    """The training step: with the discriminator, unless it never starts.

    Raises:
        ConfigError: the mesh or the batch does not fit the devices.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    sharding.check_batch(config.data.batch_size, config.optimizer.accumulate, mesh)
    arguments = _step_arguments(config, mesh)
    state = arguments[0]
    traced = trace_step(config, mesh)
    jaxpr = traced.jaxpr.jaxpr
    flops = model_flops = matmul_flops(needed(jaxpr)) / mesh.size
    if config.model.remat:
        plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))
        model_flops = matmul_flops(needed(trace_step(plain, mesh).jaxpr.jaxpr)) / mesh.size
    lowered = _Lowered(
        name="train step",
        lowered=traced.lower(),
        mesh=mesh,
        parameters=_local_bytes((state.params, state.frozen, state.discriminator)),
        optimizer=_local_bytes((state.optimizer, state.discriminator_optimizer)),
        arguments=_local_bytes(arguments),
        flops=flops,
        model_flops=model_flops,
    )
    return dataclasses.replace(_compile(lowered, target), parts=step_parts(config, jaxpr, mesh.size))


def plan_decode(config: Config, target: Target) -> Program:
    """Decoding a batch of the config's size, split over the chips as in training, with the condition if there is one.

    Raises:
        ConfigError: as `plan_step`.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    sharding.check_batch(config.data.batch_size, 1, mesh)
    side = config.data.image_size
    return _plan_decode(
        "decode", config, target, (config.data.batch_size, side, side), mesh, sharding.batch_sharding(mesh)
    )


def plan_picture(config: Config, target: Target, size: tuple[int, int]) -> Program:
    """Decoding one picture of `size` (height, width), its rows split over all chips, as `inference.decode` does.

    Raises:
        InputError: the size is not a multiple of the model's downsampling, or its rows cannot be split evenly.
    """
    mesh = sharding.make_height_mesh(target.devices)
    multiple = config.model.downsampling
    if size[0] % (multiple * mesh.size) or size[1] % multiple:
        raise InputError(
            f"a picture of {size[1]} x {size[0]} px: expected a width that is a multiple of {multiple}, and for "
            f"{mesh.size} chips a height that is a multiple of {multiple * mesh.size}"
        )
    return _plan_decode("decode of a picture", config, target, (1, *size), mesh, sharding.height_sharding(mesh))


def _plan_decode(
    name: str, config: Config, target: Target, shape: tuple[int, int, int], mesh: Mesh, place: NamedSharding
) -> Program:
    """Decoding pictures of (batch, height, width) at `place`."""
    (batch, height, width), factor = shape, config.model.downsampling

    def maps(height: int, width: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, height, width, channels), jnp.float32, sharding=place)

    inputs = [maps(height // factor, width // factor, config.model.latent_channels)]
    if config.model.condition:
        inputs += [maps(height, width, config.model.image_channels), maps(height, width, 1)]
    graphdef, shapes = structure(config.model)
    params = sharding.placed_shapes(shapes, mesh)

    def decode(params: Params, *inputs: jax.Array) -> jax.Array:
        return merge(graphdef, params).decode(*inputs)

    with jax.set_mesh(mesh):
        traced = jax.jit(decode, out_shardings=place).trace(params, *inputs)
    # The encoder's parameters are arguments that nothing reads, and are not passed on.
    used = {name: x for name, x in params.items() if name.startswith(("decoder.", "post_quant_conv.", "codebook."))}
    return _plan_forward(name, traced, mesh, used, inputs, target)


def plan_denoising(unet: UNetConfig, target: Target, shape: tuple[int, int, int], steps: int, tokens: int) -> Program:
    """The whole loop of a sampler, DPM-Solver++, with guidance, in bfloat16; weights on every chip, the batch split.

    Args:
        unet: sizes of the network.
        target: the chips.
        shape: (pictures, height, width) of the latents; the pictures split evenly over the chips.
        steps: of the sampler.
        tokens: of a text.
    """
    mesh = sharding.make_mesh(MeshConfig(), target.devices)
    place, whole, dtype = sharding.batch_sharding(mesh), sharding.replicated(mesh), jnp.bfloat16

    def maps(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    graphdef, shapes = split(nnx.eval_shape(lambda: UNet(unet, dtype=dtype, rngs=seeded(0))))
    params = {
        n: jax.ShapeDtypeStruct(x.shape, dtype if n.endswith(".kernel") else x.dtype, sharding=whole)
        for n, x in shapes.items()
    }
    solver = make_solver(SchedulerConfig(kind="dpm++"), steps)
    fixed = unet.in_channels - unet.out_channels
    parts: Any = {
        "noise": maps(*shape, unet.out_channels),
        "context": maps(shape[0], 2, tokens, unet.context),
        "fixed": maps(*shape, fixed) if fixed else None,
    }
    if unet.added:
        added: Any = (maps(shape[0], 2, unet.pooled), maps(shape[0], 2, SIZES))
        parts["added"] = Added(*added)
    batch = Batch(**parts)

    def loop(params: Params, batch: Batch) -> jax.Array:
        sample: Any = denoise
        result: jax.Array = sample(merge(graphdef, params), solver, jnp.float32(7.5), batch, mesh=mesh)
        return result

    traced = jax.jit(loop, out_shardings=place).trace(params, batch)
    return _plan_forward("denoising", traced, mesh, params, batch, target)


def _plan_forward(
    name: str, traced: jax.stages.Traced, mesh: Mesh, params: Any, inputs: Any, target: Target
) -> Program:
    """Compiles a program that trains nothing, given the parameters and inputs that it reads."""
    flops = matmul_flops(traced.jaxpr) / mesh.size
    lowered = _Lowered(
        name=name,
        lowered=traced.lower(),
        mesh=mesh,
        parameters=_local_bytes(params),
        optimizer=0,
        arguments=_local_bytes((params, inputs)),
        flops=flops,
        model_flops=flops,
    )
    return _compile(lowered, target)


def trace_step(config: Config, mesh: Mesh) -> jax.stages.Traced:
    """The training step, traced by the shapes of its arguments, with the discriminator unless it never starts."""
    state, perceptual, batch = _step_arguments(config, mesh)
    step = compiled_step(make_blueprint(config), state, mesh)
    with jax.set_mesh(mesh):
        return step.trace(state, perceptual, batch, adversarial=config.loss.gan_start >= 0)


def _step_arguments(config: Config, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The state, LPIPS's parameters and a batch: shapes and places, without values."""
    blueprint = make_blueprint(config)
    state = abstract_state(blueprint, mesh)
    perceptual: Any = {}
    if blueprint.lpips is not None:
        perceptual = sharding.placed_shapes(split(nnx.eval_shape(lambda: LPIPS("vgg16", rngs=seeded(0))))[1], mesh)
    shape = (config.data.batch_size, config.data.image_size, config.data.image_size)
    place = sharding.batch_sharding(mesh)
    channels = {"image": config.model.image_channels, "mask": 1}
    batch = {n: jax.ShapeDtypeStruct((*shape, c), jnp.uint8, sharding=place) for n, c in channels.items()}
    return state, perceptual, batch


def _local_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _compile(program: _Lowered, target: Target) -> Program:
    """Compiles a program, or reads what an earlier compilation of the very same one found."""
    file = _kept(program, target)
    if file.is_file():
        log.info("%s: compiled before, kept in %s", program.name, file)
        return _from_json(file.read_text())
    log.info("%s: compiling for %d devices of %s ...", program.name, program.mesh.size, target.name)
    begin = time.perf_counter()
    try:
        with nullcontext() if target.name == "local" else no_jax_cache():
            compiled = program.lowered.compile(dict(target.options) or None)
    except jax.errors.JaxRuntimeError as error:
        shortage = out_of_memory(str(error))
        if shortage is None:
            raise
        result = _too_large(program, *shortage, time.perf_counter() - begin)
    else:
        result = _read(program, compiled, time.perf_counter() - begin)
    write_bytes(file, json.dumps(dataclasses.asdict(result), indent=2).encode())
    return result


@contextmanager
def no_jax_cache() -> Iterator[None]:
    """Turns JAX's own cache off: it would store programs for devices that are absent, and then fail to read them."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _kept(program: _Lowered, target: Target) -> Path:
    """Where the result of a program is kept: named by all that it depends on."""
    parts = [
        VERSION,
        program.lowered.as_text(),
        target.name,
        target.compiler,
        sorted(target.options.items()),
        [d.id for d in program.mesh.devices.flat],
    ]
    parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asymvq_jax" / "plans" / f"{key}.json"


def _from_json(text: str) -> Program:
    values = json.loads(text)
    moves = tuple(Collective(**{**c, "axes": tuple(c["axes"])}) for c in values["collectives"])
    # Counted anew at each tracing.
    values.pop("parts", None)
    return Program(**{**values, "memory": Memory(**values["memory"]), "collectives": moves})


def _read(program: _Lowered, compiled: jax.stages.Compiled, seconds: float) -> Program:
    """What the compiler says about a compiled program, with its omissions made good."""
    stats, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert stats is not None, program.name
    assert cost is not None, program.name
    assert text is not None, program.name
    # It counts a loop's body once: of micro-batches or of a sampler's steps, in which nearly everything happens.
    repeats = max(1, round(program.flops / cost["flops"])) if cost["flops"] > 0 else 1
    return Program(
        memory=Memory(
            parameters=program.parameters,
            optimizer=program.optimizer,
            other=stats.argument_size_in_bytes - program.parameters - program.optimizer,
            temporaries=stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        ),
        exceeded=None,
        flops=program.flops,
        model_flops=program.model_flops,
        compiler_flops=cost["flops"] * repeats,
        moved=cost["bytes accessed"] * repeats,
        collectives=tuple(collectives(text, program.mesh.shape)),
        compile_seconds=seconds,
    )


def _too_large(program: _Lowered, required: int, available: int, seconds: float) -> Program:
    """A program that the compiler refused; of its memory only the sum is known, and the arguments by their shapes."""
    return Program(
        memory=Memory(
            parameters=program.parameters,
            optimizer=program.optimizer,
            other=program.arguments - program.parameters - program.optimizer,
            temporaries=required - program.arguments,
            code=0,
        ),
        exceeded=available,
        flops=program.flops,
        model_flops=program.model_flops,
        compiler_flops=None,
        moved=None,
        collectives=(),
        compile_seconds=seconds,
    )


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Bytes required and available, from a TPU compiler's message; None if it is about something else."""
    number = r"([\d.]+)([KMG])"
    for pattern in (rf"\({number}\) exceeds available HBM \({number}\)", rf"Used {number} of {number} hbm"):
        if match := re.search(pattern, message):
            values = (float(match[i]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[match[i + 1]] for i in (1, 3))
            required, available = map(round, values)
            return required, available
    return None
