"""What pictures are generated from, and how: the options of `asymvq generate`. This module imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from asymvq_jax.config import Dtype

Task = Literal["text", "inpaint", "edit"]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """What all tasks share."""

    task: ClassVar[Task]

    # A diffusers pipeline folder; for text and inpaint also an original checkpoint (.ckpt, .safetensors).
    pipeline: str
    # The picture to write (.png, .jpg, .webp); a directory with --folder or --count.
    out: str
    # Many pictures at once: a folder of inputs, name.txt for a prompt, name.png for a picture, name_mask.png for its
    # mask and name_example.png for an example. Pictures that are in --out already are not made again.
    folder: str | None = None
    # An asymmetric decoder: a run, or anything that `asymvq convert` reads.
    checkpoint: Annotated[str | None, tyro.conf.arg(aliases=["--decoder"])] = None
    # How latents are scaled, (latent - shift) * scaling, where the pipeline's or the checkpoint's file does not say it.
    scaling_factor: float | None = None
    # The shift of the same.
    shift_factor: float | None = None
    # What to decode with: plain is the decoder that came with the pipeline, both puts the two side by side; by default
    # asymmetric if there is one.
    decode: Literal["plain", "asymmetric", "both"] | None = None
    # HEIGHTxWIDTH, px: of the pictures, by default the model's; with a picture, the size to which it and its mask are
    # scaled, by default theirs.
    size: str | None = None
    # Strength of the condition, 0 to 100; 1: none.
    guidance: float = 7.5
    # Steps of the sampler.
    steps: int = 50
    # The sampler; by default the pipeline's own.
    scheduler: Literal["ddim", "pndm", "dpm++", "euler", "euler-ancestral", "heun", "unipc", "ddpm", "lcm"] | None = (
        None
    )
    # Seed of the first picture (by name); the next ones have the next seeds.
    seed: int = 0
    # Pictures of the same inputs.
    count: int = 1
    # Pictures at once; by default one for each device.
    batch: int | None = None
    # Also write each latent to this directory, as .npy files that `asymvq evaluate` and `asymvq inpaint` read.
    save_latents: str | None = None
    # Type in which everything is computed.
    dtype: Dtype = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Prompted(Generate):
    """What the tasks with a text share."""

    # The text.
    prompt: str | None = None
    # A text that guidance leads away from.
    negative: str = ""
    # A LoRA that is merged into UNet and text encoder, FILE or FILE:WEIGHT; may be repeated.
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    # For an original checkpoint: a folder with CLIP's vocab.json and merges.txt.
    tokenizer: str | None = None
    # For an original Stable Diffusion 2 checkpoint: what its network predicts.
    prediction_type: Literal["epsilon", "v_prediction"] | None = None


@dataclass(frozen=True, kw_only=True)
class Text(Prompted):
    """Generate pictures that a text describes."""

    task: ClassVar[Task] = "text"


@dataclass(frozen=True, kw_only=True)
class Painting(Generate):
    """What the tasks with a picture and a mask share."""

    # The original picture.
    image: str | None = None
    # A picture of the same size: white = generate, black = preserve. Strokes of one colour, transparency and erased
    # pictures are understood too; what was understood is said.
    mask: str | None = None
    # Greys of the mask blend; without this the threshold is 0.5.
    soft_mask: bool = False
    # What of the mask's file is the mask; by default found.
    mask_channel: Literal["grey", "red", "green", "blue", "alpha"] | None = None
    # Black = generate, white = preserve.
    invert_mask: bool = False
    # model: what the decoder makes. exact: also paste the preserved pixels back, with any decoder. By default model, or
    # exact with --blend, --band and --crop-and-stitch.
    keep: Literal["model", "exact"] | None = None
    # How exact sets the fill into the picture; see `asymvq inpaint`.
    blend: Literal["none", "feather", "multiband", "tone", "poisson"] | None = None
    # Width of the transition of feather and multiband, px; 8 by default.
    band: int | None = None
    # Fill only the surroundings of the mask, scaled to --work-size, and leave the rest of the picture alone.
    crop_and_stitch: bool = False
    # How much of the surroundings: the side of a square, as a multiple of the longer side of the mask's box; by default
    # 1.5.
    context: float | None = None
    # The longer side, px, at which the surroundings are filled; by default the model's.
    work_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inpaint(Painting, Prompted):
    """Generate the masked region of a picture anew, as a text describes it."""

    task: ClassVar[Task] = "inpaint"

    # The share of the steps that are done, above 0 to 1; below 1 the masked region starts from what is there.
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Edit(Painting):
    """Paint the content of an example picture into the masked region (Paint-by-Example)."""

    task: ClassVar[Task] = "edit"

    # The picture whose content is painted in.
    example: str | None = None
    # Strength of the condition, 0 to 100; 1: none.
    guidance: float = 5.0
