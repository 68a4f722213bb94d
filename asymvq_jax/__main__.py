"""The command `asymvq`, also `python -m asymvq_jax`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

ABOUT = """\
usage: asymvq COMMAND [OPTIONS]

The asymmetric VQGAN for Stable Diffusion (arXiv 2306.04632) in JAX: a decoder that keeps the pixels that must stay.

use a model
  inpaint     decode an edited latent so that the picture's unmasked pixels stay
  decode      decode latents of other programs to pictures
  generate    run Stable Diffusion: text, inpaint or edit, decoded with the asymmetric decoder
  page        serve a web page on which masks are painted and decoders compared
  serve       serve inpainting over HTTP

weights
  convert     convert weights between this package, diffusers and the original PyTorch files
  export      write the decoder as one file that serves with JAX alone

train and measure
  train       train a model; the same command again resumes
  evaluate    measure what a decoder preserves and how well it fills
  score       FID, KID and Inception Score of a folder of pictures
  build-data  pack pictures into a TFDS data set, or verify one
  masks       draw samples of the training masks
  plan        find the memory and the least time of a run on chips that need not be present
  benchmark   time this package beside PyTorch (in a clone of the repository)

asymvq COMMAND --help lists the options. A start with the models inside the package:
  asymvq inpaint --image in.png --mask mask.png --out out.png
  asymvq train --config demo
and with Stable Diffusion's autoencoder and your pictures:
  hf download stabilityai/sd-vae-ft-mse --local-dir sd-vae-ft-mse
  asymvq convert --checkpoint sd-vae-ft-mse --out weights/stable_diffusion
  asymvq train --config x2 --data.source folder --data.path photos
  asymvq inpaint --image in.png --mask mask.png --checkpoint runs/x2 --out out.png

--version prints the versions and the devices. After a command, --traceback (or ASYMVQ_TRACEBACK=1) adds the stack of
calls to an error message. Exit codes: 0 done; 1 failed; 2 wrong input; 75 asked to stop and saved; 76 another process
of the run has ended; 130 interrupted by Ctrl-C.
"""
# The commands, and the modules of asymvq_jax.commands that have their `main`.
COMMANDS = {
    "inpaint": "inpaint",
    "decode": "decode",
    "generate": "generate",
    "page": "page",
    "serve": "serve",
    "convert": "convert",
    "export": "export",
    "train": "train",
    "evaluate": "evaluate",
    "score": "score",
    "build-data": "build_data",
    "masks": "masks",
    "plan": "plan",
    "benchmark": "benchmark",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    from asymvq_jax.commands.entry import group

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(_version())
        return 0
    return group("asymvq", ABOUT, {name: _loader(module) for name, module in COMMANDS.items()})(words)


def run() -> None:
    """Runs one command and ends the process, also where Ctrl-C comes before the command has begun."""
    try:
        from asymvq_jax.commands.entry import leave

        leave(main())
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:
        # The reader of the output, such as head, has had enough; as a shell reports it.
        os._exit(141)


def _loader(module: str) -> Callable[[], Callable[[Sequence[str] | None], int]]:
    def load() -> Callable[[Sequence[str] | None], int]:
        main: Callable[[Sequence[str] | None], int] = importlib.import_module(f"asymvq_jax.commands.{module}").main
        return main

    return load


def _version() -> str:
    import flax
    import jax

    import asymvq_jax

    devices = [f"{len(jax.local_devices())} x {jax.local_devices()[0].device_kind} ({jax.default_backend()})"]
    versions = [f"{m.__name__.replace('_', '-')} {m.__version__}" for m in (asymvq_jax, jax, flax)]
    return "\n".join([*versions, *devices])


if __name__ == "__main__":
    run()
