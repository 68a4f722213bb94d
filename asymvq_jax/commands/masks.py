"""asymvq masks."""

from __future__ import annotations

from dataclasses import dataclass

from asymvq_jax.commands.entry import command


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Draw samples of the masks that training uses, of every published distribution, as one picture."""

    # The picture to write: .png, .jpg or .webp.
    out: str


def work(options: Masks) -> None:
    """Draws and writes the picture."""
    from asymvq_jax.data.masks import samples
    from asymvq_jax.files import images
    from asymvq_jax.files.outputs import check_writable

    check_writable(options.out, images.FORMATS)
    images.write(options.out, samples())


main = command("asymvq masks", Masks, work, positional=("out",))
