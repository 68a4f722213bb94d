"""The other processes of a command that is started on several hosts: working with them, or beside them."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from asymvq_jax.errors import ConfigError, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# How many processes a launcher has started, which of them this is, and which on its host.
LAUNCHERS = (
    # First, for mpirun may have been started by Slurm.
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    # Of a step: an interactive allocation has more tasks than this one process.
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)
# The others have to be started within this time, s.
JOIN_TIMEOUT = 300
# A process that has sent no sign of life for so long is taken for dead, and the others end: longer than a machine that
# is short of memory or being migrated stalls.
HEARTBEAT_TIMEOUT = 60
# At the end the others wait so long for process 0, which completes the last checkpoint.
SHUTDOWN_TIMEOUT = 300


def join() -> None:
    """Joins the other processes of the computation; does nothing where this is the only one.

    TPU pods, Slurm and Open MPI are recognised; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

    Raises:
        ConfigError: the environment names other processes, but not all that it takes to find them, or a port that is
            not free.
    """
    variables = _variables()
    explicit: dict[str, Any] = {}
    try:
        if len(variables) == 3:
            # JAX itself reads the address only.
            explicit = {"num_processes": int(variables[COUNT]), "process_id": int(variables[INDEX])}
            explicit["cluster_detection_method"] = "deactivate"
            _check_port(variables[ADDRESS], first=explicit["process_id"] == 0)
            log.info(
                "waiting at %s for all %s processes, up to %d s", variables[ADDRESS], variables[COUNT], JOIN_TIMEOUT
            )
        jax.distributed.initialize(
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
            **explicit,
        )
    except (ValueError, OSError) as error:
        if variables:
            raise ConfigError(
                f"cannot find the other processes: {error} Set {ADDRESS}, {COUNT}, {INDEX}; got {variables}"
            ) from None
        if "coordinator_address" not in str(error):
            raise
        if (count := next((n for name, *_ in LAUNCHERS if (n := os.environ.get(name, "1")) != "1"), None)) is not None:
            # They would all write the same run.
            raise ConfigError(
                f"there are {count} processes, and JAX cannot find the others: set {ADDRESS}, {COUNT} and {INDEX}"
            ) from None


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}


def _check_port(address: str, *, first: bool) -> None:
    """Raises where JAX would crash: ValueError for an address without port, OSError where the first cannot have it."""
    # Where process 0 listens, if not there.
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
    for text in (address, bound):
        if not re.fullmatch(r".+:\d+", text) or int(text.rpartition(":")[2]) > 65535:
            raise ValueError(f"{text!r} is not host:port.")
    if first:
        port = int(bound.rpartition(":")[2])
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise OSError(f"process 0 cannot listen on port {port} of this machine ({error}).") from None


def share() -> tuple[int, int]:
    """The part of the work that this process does, where several independent processes share it.

    Nothing connects them: each may end, fail, or be started again without the others. JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say it, or Slurm or Open MPI, under which JAX gives each process one GPU; TPUs of a pod know of their
    hosts.

    Returns:
        This process's index and their number; (0, 1) alone.

    Raises:
        ConfigError: the environment says only a part of it.
    """
    launcher = next((names for names in ((COUNT, INDEX, ""), *LAUNCHERS) if {*names[:2]} <= os.environ.keys()), None)
    if launcher is None:
        if variables := _variables():
            raise ConfigError(f"which share of the work is this process's? Set {COUNT} and {INDEX}; got {variables}")
        # libtpu counts the hosts of a pod; elsewhere this is (0, 1).
        return jax.process_index(), jax.process_count()
    count, index = os.environ[launcher[0]], os.environ[launcher[1]]
    local = os.environ.get(launcher[2])
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        names = " and ".join(launcher[:2])
        raise ConfigError(f"{names} are {count!r} and {index!r}: expected a number and an index from 0 to below it")
    if local is not None:
        # As jax.distributed.initialize does.
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", os.environ.get("JAX_LOCAL_DEVICE_IDS", local))
    return int(index), int(count)


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on process 0, on all processes; the others do not call it.

    Args:
        work: returns what JSON can hold.

    Raises:
        UserError: on all processes, where `work` does.
    """
    if jax.process_count() == 1:
        return work()
    data = b""
    if jax.process_index() == 0:
        try:
            answer: dict[str, Any] = {"value": work()}
        except UserError as error:
            answer = {"error": str(error)}
        data = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    sent = np.frombuffer(data.ljust(size), np.uint8)
    said: dict[str, Any] = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if "error" in said:
        raise UserError(said["error"])
    value: T = said["value"]
    return value


def leave(code: int) -> None:
    """Ends a process that has joined others after an error, without waiting for those, which may go on or be gone."""
    if not jax.distributed.is_initialized():
        return
    sys.stderr.flush()
    # Where all of them met the same error, JAX must not abort one because another ended first.
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    farewell.join(10)
    os._exit(code)
