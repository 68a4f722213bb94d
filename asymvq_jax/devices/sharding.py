"""The device mesh, and the rules that place every parameter, optimizer slot and activation on it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from asymvq_jax.config import MeshConfig
from asymvq_jax.errors import ConfigError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# The one axis of a mesh that splits pictures' rows instead of batches, for pictures that one device cannot hold.
HEIGHT = "height"
# Smaller arrays stay replicated: splitting them saves less memory than the collectives cost.
MIN_SHARDED_BYTES = 4 * 2**20


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in the mesh (data, fsdp, tensor).

    Where they are of several slices, the slices lie along data, each of them whole, so that only the batch is split
    over the network between them.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or data does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        # Which axes the user may change, and to what.
        fixed = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size != -1}
        rest = math.prod(size for axis, size in fixed.items() if axis != "data")
        if "data" in fixed and len(devices) % rest == 0:
            advice = "set --mesh.data=-1 to let the data axis take what fsdp and tensor leave"
        else:
            named = " x ".join(f"mesh.{axis}" for axis, size in fixed.items() if size > 1)
            advice = f"choose {named} so that the product divides {len(devices)}"
        raise ConfigError(f"mesh (data, fsdp, tensor)={tuple(sizes)} does not fit {len(devices)} device(s); {advice}")
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    slices = count_slices(devices)
    if config.slices not in (-1, slices):
        raise ConfigError(f"mesh.slices={config.slices}: the devices are of {slices}; set it to that, or to -1")
    if slices > 1:
        if sizes[0] % slices:
            raise ConfigError(f"mesh.data={sizes[0]}: expected a multiple of the {slices} slices of the devices")
        inside, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        arranged = mesh_utils.create_hybrid_device_mesh(inside, between, devices)
        return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Of how many slices the devices are; those that do not say are of one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_height_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices along `HEIGHT`; XLA exchanges the rows that convolutions reach across the borders."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (HEIGHT,), axis_types=(AxisType.Auto,), devices=devices)


def height_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 1, the rows, split over the mesh of `make_height_mesh`."""
    return NamedSharding(mesh, PartitionSpec(None, HEIGHT))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def part_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of every batch this process's devices hold.

    Processes along the tensor axis hold the same part.

    Raises:
        ConfigError: the parts of two processes overlap, but are not the same.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((ways,))
    for device, (row,) in places.items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    parts = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, parts)) != ways:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']}: expected a divisor or a multiple of the "
            f"{jax.local_device_count()} devices of a process"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ConfigError unless every micro-batch splits evenly over the mesh's batch axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * accumulate):
        raise ConfigError(
            f"data.batch_size={batch_size}: expected a multiple of {ways * accumulate} "
            f"(mesh data x fsdp = {ways}, optimizer.accumulate = {accumulate})"
        )


def parameter_spec(shape: Sequence[int], mesh: Mesh | AbstractMesh, itemsize: int = 4) -> PartitionSpec:
    """The rule for one array: output channels over tensor, the wider of the other channel axes over fsdp.

    Kernels are (height, width, in, out), some with time before; anything of another rank, and anything small, is
    replicated, and on a height mesh everything.
    """
    if HEIGHT in mesh.shape or len(shape) not in (4, 5) or math.prod(shape) * itemsize < MIN_SHARDED_BYTES:
        return PartitionSpec()
    inputs = "fsdp" if shape[-2] % mesh.shape["fsdp"] == 0 else None
    outputs = "tensor" if shape[-1] % mesh.shape["tensor"] == 0 else None
    return PartitionSpec(*[None] * (len(shape) - 2), inputs, outputs)


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of (abstract) arrays: parameters and all that mirrors them, by `parameter_spec`.

    Logs every large array that the rule had to leave replicated along an axis of the mesh.
    """

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = parameter_spec(leaf.shape, mesh, np.dtype(leaf.dtype).itemsize if hasattr(leaf, "dtype") else 4)
        wanted = [a for a in ("fsdp", "tensor") if spec and mesh.shape[a] > 1 and a not in spec]
        if wanted:
            log.warning("%s %s stays whole along %s", jax.tree_util.keystr(path), leaf.shape, ", ".join(wanted))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def placed_shapes(tree: Any, mesh: Mesh) -> Any:
    """A tree of (abstract) arrays as shapes and types with the places that `state_sharding` gives them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, state_sharding(tree, mesh)
    )


def constrain_activation(x: jax.Array) -> jax.Array:
    """Keeps an activation split as its picture is under the current mesh: along the batch axis over data and fsdp, or
    along its rows over the height mesh. Without a mesh, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    free = PartitionSpec.UNCONSTRAINED
    if HEIGHT in mesh.shape:
        spec = PartitionSpec(None, HEIGHT, *[free] * (x.ndim - 2))
    else:
        spec = PartitionSpec(BATCH_AXES, *[free] * (x.ndim - 1))
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def activation_ways() -> int:
    """Over how many devices the current mesh splits an activation: its pictures, or on a height mesh its rows."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in (*BATCH_AXES, HEIGHT))


def height_ways() -> int:
    """Over how many devices the current mesh splits a picture's rows; 1 without a height mesh."""
    return int(jax.sharding.get_abstract_mesh().shape.get(HEIGHT, 1))


def gather_rows(x: jax.Array) -> jax.Array:
    """Gathers what the current height mesh splits by rows, once, onto every device; without one, does nothing."""
    if height_ways() == 1:
        return x
    gathered: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * x.ndim))
    return gathered


def gather_kernel(kernel: jax.Array) -> jax.Array:
    """Gathers a kernel over fsdp where it is used, so that XLA moves weights and never activations."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return kernel
    spec = parameter_spec(kernel.shape, mesh)
    outputs = "tensor" if spec and spec[-1] == "tensor" else None
    whole = PartitionSpec(*[None] * (kernel.ndim - 1), outputs)
    gathered: jax.Array = jax.lax.with_sharding_constraint(kernel, whole)
    return gathered
