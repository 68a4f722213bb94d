"""asymvq page."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype
from asymvq_jax.errors import ConfigError

if TYPE_CHECKING:
    from asymvq_jax.models.autoencoder import Autoencoder

# The models inside the package.
CHECKPOINT, PLAIN = "tiny", "tiny-plain"


@dataclass(frozen=True, kw_only=True)
class Page:
    """Serve a web page on which masks are painted and three ways of decoding are compared."""

    # The model: a run, or anything that `asymvq convert` reads; by default the small model inside the package.
    checkpoint: str = CHECKPOINT
    # The decoder that came with the encoder, in any of the same forms; by default, and only beside that small model,
    # the one inside the package.
    plain: str | None = None
    # How a diffusion model scales the models' latents, (latent - shift) * scaling, where a file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # The address to listen at; 0.0.0.0 lets other machines in.
    host: str = "127.0.0.1"
    # The port to listen at.
    port: int = 7860
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Page) -> None:
    """Serves the page until it is interrupted."""
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: expected 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio; install it in a clone with: pip install -e '.[demo]'")
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.evaluation import page

    keep_compiled_programs()
    page.serve(*_load(options), options.host, options.port)


def _load(options: Page) -> tuple[Autoencoder, Autoencoder | None]:
    """Our model, and the plain one where there is one."""
    from asymvq_jax.convert.convert import given_factors, read_model
    from asymvq_jax.evaluation.rows import check_same_encoder
    from asymvq_jax.inference import check_condition

    checkpoint, plain = options.checkpoint, options.plain or (PLAIN if options.checkpoint == CHECKPOINT else None)
    factors = given_factors(options.scaling_factor, options.shift_factor)
    model = read_model(checkpoint, factors, dtype=options.dtype)
    check_condition(model.config, f"--checkpoint {checkpoint}")
    if plain is None:
        return model, None
    other = read_model(plain, factors, dtype=options.dtype)
    check_same_encoder(model, other)
    return model, other


main = command("asymvq page", Page, work)
