"""asymvq decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asymvq_jax.commands.entry import command
from asymvq_jax.config import Dtype


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode latents of other programs to pictures, without a picture to preserve."""

    # Latents of a diffusion model, one or a batch: .npy, .npz, .safetensors, .pt, ComfyUI's .latent.
    latent: str
    # The picture to write: .png, .jpg or .webp; for several latents a directory.
    out: str
    # The model: a run, or anything that `asymvq convert` reads; by default the small model inside the package.
    checkpoint: str = "tiny"
    # The latents' layout; by default found by their shape, and refused where it fits both.
    latent_layout: Literal["channels-first", "channels-last"] | None = None
    # Whether the latents have been multiplied by the scaling factor, as diffusion models have them; by default what the
    # file says, or else found by the spread of the values, and refused where that does not show it.
    latent_scaled: Literal["yes", "no"] | None = None
    # HEIGHTxWIDTH of the pictures, px: for latents packed into tokens (FLUX, Qwen-Image), which do not show it. Others
    # are checked, and sides that are not multiples of the downsampling are cut off.
    size: str | None = None
    # In strips of rows, for pictures that the device's memory cannot hold.
    large: Literal["strips"] | None = None
    # How a diffusion model scales the model's latents, (latent - shift) * scaling, where its file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # Compute type; by default the checkpoint's.
    dtype: Dtype | None = None


def work(options: Decode) -> None:
    """Decodes and writes, one picture at a time."""
    from etils import epath

    from asymvq_jax.config import ModelConfig
    from asymvq_jax.convert.convert import given_factors, read_model
    from asymvq_jax.devices.compilation import keep_compiled_programs
    from asymvq_jax.errors import InputError
    from asymvq_jax.files import images
    from asymvq_jax.files.outputs import check_not_input, check_writable, try_out, writing
    from asymvq_jax.files.pictures import FORMATS
    from asymvq_jax.files.tensors import read_latent_file
    from asymvq_jax.inference.latents import count_latents, understand_alone
    from asymvq_jax.inference.strips import decode_in_strips
    from asymvq_jax.inference.whole import decode

    check_not_input("--out", options.out, {"--latent": options.latent})
    size = None if options.size is None else images.parse_size("--size", options.size)
    file = read_latent_file(options.latent)
    layout = options.latent_layout or file.layout
    out = epath.Path(options.out)

    def check_out(config: ModelConfig) -> None:
        """How many latents there are depends on the model; known before its weights are read."""
        count = count_latents(file.values, config, size=size, layout=layout)
        if count == 1:
            check_writable(out, FORMATS)
        elif out.suffix.lower() in FORMATS or out.is_file():
            raise InputError(f"--out {out}: {options.latent} holds {count} latents; expected a directory")
        else:
            with writing(out):
                try_out(out)

    keep_compiled_programs()
    factors = given_factors(options.scaling_factor, options.shift_factor)
    model = read_model(options.checkpoint, factors, dtype=options.dtype, known=check_out)
    said = None if options.latent_scaled is None else options.latent_scaled == "yes"
    reading = understand_alone(
        file.values,
        model.config,
        size=size,
        layout=layout,
        scaled=file.scaled if said is None else said,
        norm=model.normalization(),
    )
    count = len(reading.latent)
    outs = [out] if count == 1 else [out / f"{number:04d}.png" for number in range(count)]
    for path, latent in zip(outs, reading.latent, strict=True):
        picture = (decode_in_strips if options.large else decode)(model, latent[None])[0]
        if size is not None:
            picture = picture[: size[0], : size[1]]
        images.write(path, images.to_uint8(picture))
    height, width = picture.shape[:2]
    print(f"{options.out}: {count} of {width} x {height} px; {reading.describe()}")


main = command("asymvq decode", Decode, work)
