"""Compiles the programs of one picture while its weights are still being read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from asymvq_jax.config import ModelConfig
from asymvq_jax.devices.compilation import compiled
from asymvq_jax.inference.whole import Program, decode, decode_program, encode, encode_program
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.parameters import merge


def compile_ahead(
    config: ModelConfig, size: tuple[int, int], *, encodes: bool, margin: int = 0
) -> dict[str, Callable[..., Any]]:
    """Starts to compile the encode and the decode of one picture, each in a thread: XLA compiles without Python's lock.

    Args:
        config: the model's.
        size: the picture's height and width, px.
        encodes: whether the picture will be encoded; else only the decode is compiled.
        margin: that of the decode.

    Returns:
        "encode" and "decode" as in `inference.whole`, which wait for what is compiled, and compile anew for arrays of
        other shapes or types.
    """
    multiple = config.downsampling
    height, width = (-(-side // multiple) for side in size)
    model = merge(*structure(config))

    def maps(scale: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, scale * height, scale * width, channels), jnp.float32)

    picture = maps(multiple, config.image_channels)
    condition = (picture, maps(multiple, 1)) if config.condition else (None, None)
    pool = ThreadPoolExecutor(2, thread_name_prefix="compile")
    programs: dict[str, Callable[..., Any]] = {
        "decode": partial(
            decode,
            program=_awaited(pool, decode_program, model, maps(1, config.latent_channels), *condition, margin=margin),
        )
    }
    if encodes:
        programs["encode"] = partial(encode, program=_awaited(pool, encode_program, model, picture))
    pool.shutdown(wait=False)
    return programs


def _awaited(
    pool: ThreadPoolExecutor, program: Any, model: Any, *shapes: jax.ShapeDtypeStruct | None, **static: int
) -> Program:
    """Begins to compile a program for arrays of `shapes`; the result calls it."""
    begun: Future[Program] = pool.submit(lambda: compiled(program.lower(model, *shapes, **static)))

    def call(model: Any, *arrays: Any, **given: int) -> jax.Array:
        if list(map(_form, arrays)) != list(map(_form, shapes)) or given != {n: x for n, x in static.items() if x}:
            result: jax.Array = program(model, *arrays, **given)
            return result
        return begun.result()(model, *arrays)

    return call


def _form(x: Any) -> tuple[Any, ...] | None:
    return None if x is None else (tuple(x.shape), jnp.dtype(x.dtype))
