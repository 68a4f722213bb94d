"""asymvq generate."""

from __future__ import annotations

from collections.abc import Callable

from asymvq_jax.commands.entry import Main, command, group
from asymvq_jax.diffusion.settings import Edit, Generate, Inpaint, Text

ABOUT = """\
usage: asymvq generate TASK [OPTIONS]

Stable Diffusion in JAX, decoded with the asymmetric decoder.

tasks (asymvq generate TASK --help lists the options):
  text     pictures that a text describes
  inpaint  the masked region of a picture anew, as a text describes it
  edit     the content of an example picture in the masked region (Paint-by-Example)

One picture, or a folder of inputs (--folder); pictures that exist already are not made again. Started on each of
several hosts, the hosts share the pictures out; JAX_NUM_PROCESSES and JAX_PROCESS_ID say which is which where neither
a TPU pod, nor Slurm, nor Open MPI does.
"""


def work(options: Generate) -> None:
    """Generates the pictures."""
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.diffusion import generate

    keep_compiled_programs()
    try:
        generate.run(options)
    except KeyboardInterrupt:
        if options.folder is None and options.count == 1:
            raise
        raise KeyboardInterrupt("interrupted; the same command makes the pictures that are missing") from None


def _task(kind: type[Generate]) -> Callable[[], Main]:
    return lambda: command(f"asymvq generate {kind.task}", kind, work, positional=("pipeline",))


main = group("asymvq generate", ABOUT, {kind.task: _task(kind) for kind in (Text, Inpaint, Edit)})
