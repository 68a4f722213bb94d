"""Times text-to-image beside diffusers': asymvq benchmark generate.

The denoising loop with guidance (DPM-Solver++) and the plain decode, at Stable Diffusion 1.5's sizes with random
weights, from the same noise and the same random features of texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype, ModelConfig
from asymvq_jax.convert.convert import read_model
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.diffusion.denoising import Batch, denoise
from asymvq_jax.diffusion.pipeline import read_unet
from asymvq_jax.diffusion.schedulers import SchedulerConfig
from asymvq_jax.diffusion.solvers import make_solver
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.errors import UserError
from asymvq_jax.models.autoencoder import Autoencoder, in_dtype, structure
from asymvq_jax.models.parameters import merge, seeded, split
from benchmarks import contest

SCALE, TOKENS = ModelConfig().scaling_factor, 77
GUIDANCE = 7.5
# The noise schedule of Stable Diffusion, for both sides.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Time text-to-image beside diffusers'."""

    # Height and width of the pictures, px.
    size: int = 512
    # Pictures at once.
    batch: int = 1
    # Steps of the sampler.
    steps: int = 20
    # Compute type.
    dtype: Dtype = "float32"
    # Timed runs of each contender.
    rounds: int = 5
    # Leave torch.compile out, where memory is short.
    skip_compiled: bool = False


def work(options: Generate) -> int:
    """Returns the exit code: 0, or 1 if a contender failed."""
    # Here, so that the rest of this module works without PyTorch.
    from benchmarks import peers

    config = UNetConfig()
    if options.size % (8 * config.downsampling) or options.size < 1:
        raise UserError(f"--size {options.size}: expected a multiple of {8 * config.downsampling}")
    arrays = inputs(config, options.batch, options.size)
    with tempfile.TemporaryDirectory() as directory:
        peers.random_stable_diffusion(directory)
        sampler = {"schedule": SCHEDULE, "guidance": GUIDANCE, "steps": options.steps}
        shared = {"folder": directory, "arrays": arrays, "dtype": options.dtype, **sampler}
        ways = {"PyTorch eager": False} | ({} if options.skip_compiled else {"PyTorch compiled": True})
        theirs = [contest.Contender(n, peers.generate, {**shared, "compiled": way}) for n, way in ways.items()]
        results = contest.hold([contest.Contender("ours", generate, shared), *theirs], options.rounds, warm_up=1)
    print(f"\ntext-to-image, {options.batch} x {options.size} px, {options.steps} steps, {options.dtype}")
    print(contest.machine())
    print(f"ours differs from PyTorch's by at most {contest.difference(results)}\n")
    print(contest.table(results, options.batch, flops(config, arrays, options.steps)))
    return int(any(result.failure for result in results))


def inputs(config: UNetConfig, batch: int, size: int) -> dict[str, np.ndarray]:
    """Noise (b, h / 8, w / 8, c), and random features (b, 2, n, d) of nothing and of a text."""
    rng = np.random.default_rng(0)
    return {
        "noise": rng.normal(size=(batch, size // 8, size // 8, config.out_channels)).astype(np.float32),
        "context": rng.normal(size=(batch, 2, TOKENS, config.context)).astype(np.float32),
    }


def generate(
    folder: str, arrays: dict[str, np.ndarray], *, schedule: dict, guidance: float, steps: int, dtype: str
) -> contest.Run:
    """Our pictures, in [-1, 1], by the networks in a folder."""
    keep_compiled_programs()
    unet, autoencoder = read_unet(Path(folder) / "unet", dtype), in_dtype(read_model(Path(folder) / "vae"), dtype)
    return generating(unet, autoencoder, arrays, schedule=schedule, guidance=guidance, steps=steps)


def generating(
    unet: UNet,
    autoencoder: Autoencoder,
    arrays: dict[str, np.ndarray],
    *,
    schedule: dict = SCHEDULE,
    guidance: float = GUIDANCE,
    steps: int,
) -> contest.Run:
    """Our pictures, in [-1, 1]."""
    solver = make_solver(SchedulerConfig(kind="dpm++", timestep_spacing="linspace", **schedule), steps)
    batch = jax.device_put(Batch(arrays["noise"], arrays["context"]))

    def run() -> Callable[[], np.ndarray]:
        latent = denoise(unet, solver, jnp.float32(guidance), batch)
        y = jax.block_until_ready(inference.decode(autoencoder, latent / SCALE))
        return lambda: np.asarray(y)

    return run


def flops(config: UNetConfig, arrays: dict[str, np.ndarray], steps: int) -> float:
    """Of one run's UNet and decoder, by their shapes."""
    batch, side = arrays["noise"].shape[:2]
    graphdef, shapes = split(nnx.eval_shape(lambda: UNet(config, rngs=seeded(0))))
    inputs = (
        jax.ShapeDtypeStruct((2 * batch, side, side, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((2 * batch,), jnp.float32),
        jax.ShapeDtypeStruct((2 * batch, TOKENS, config.context), jnp.float32),
    )
    predict = jax.make_jaxpr(lambda params, *x: merge(graphdef, params)(*x))(shapes, *inputs)
    plain, shapes = structure(ModelConfig(condition=False))
    latent = jax.ShapeDtypeStruct(arrays["noise"].shape, jnp.float32)
    decode = jax.make_jaxpr(lambda params, z: merge(plain, params).decode(z))(shapes, latent)
    return steps * matmul_flops(predict) + matmul_flops(decode)


main = command("asymvq benchmark generate", Generate, work)
