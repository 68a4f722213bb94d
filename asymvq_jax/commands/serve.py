"""asymvq serve."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype
from asymvq_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve inpainting over HTTP: picture, mask and perhaps a latent in, the finished picture out."""

    # The model: a run, or anything that `asymvq convert` reads; by default the small model inside the package.
    checkpoint: str = "tiny"
    # The address to listen at; 0.0.0.0 lets other machines in.
    host: str = "127.0.0.1"
    # The port to listen at.
    port: int = 8000
    # Most pictures of one size that are decoded at once.
    batch: int = 8
    # Most pictures that wait beside those; more are turned away (503).
    queue: int = 64
    # Most pixels of a picture; larger ones are refused (413).
    most_pixels: int = 4_194_304
    # Most bytes of a request; larger ones are refused (413).
    most_bytes: int = 33_554_432
    # How a diffusion model scales the model's latents, (latent - shift) * scaling, where its file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Serve) -> None:
    """Serves until it is interrupted."""
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: expected 1 to 65535")
    for name in ("batch", "queue", "most_pixels", "most_bytes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if missing := [name for name in ("fastapi", "uvicorn", "python_multipart") if not importlib.util.find_spec(name)]:
        raise ConfigError(
            f"the service needs {' and '.join(missing)}; install them in a clone with: pip install -e '.[serve]'"
        )
    import uvicorn

    from asymvq_jax.convert.convert import given_factors, read_model
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.inference.service import Limits, make_app

    keep_compiled_programs()
    factors = given_factors(options.scaling_factor, options.shift_factor)
    model = read_model(options.checkpoint, factors, dtype=options.dtype)
    limits = Limits(options.most_bytes, options.most_pixels, options.queue, options.batch)
    uvicorn.run(
        make_app(model, limits),
        host=options.host,
        port=options.port,
        # Connections; how many requests wait is the service's own limit.
        limit_concurrency=1024,
        timeout_keep_alive=5,
        ws="none",
        log_level="warning",
        server_header=False,
    )


main = command("asymvq serve", Serve, work)
