"""What a file of weights is that does not hold our models: its name, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from asymvq_jax.files.stored import StoredTensor


class Kind(NamedTuple):
    """Weights that are recognised by the names of their tensors."""

    # Found in at least one name.
    sign: str
    what: str


LORA = "it is a LoRA, small changes to another model's weights: merge it into that model, and name the result"
# The first that fits is what it is.
KINDS = (
    Kind(r"lora_(down|up|A|B|a|b)\b|\.lora\.|(^|[._])(hada_w|lokr_w|oft_blocks)", LORA),
    Kind(r"string_to_param|^emb_params$", "it is a textual inversion, words for a text encoder"),
    Kind(r"(^|\.)(control_model|controlnet_\w+|zero_convs)\.", "it is a ControlNet"),
    Kind(r"(^|\.)ip_adapter\.|^image_proj\.", "it is an IP-Adapter"),
    Kind(
        r"(^|\.)(taesd|taef1)\w*\.|^(encoder|decoder)\.layers\.\d+\.|^\d+\.conv\.\d+\.weight$",
        "it is TAESD or of its kind, a tiny autoencoder with other layers: name the full autoencoder",
    ),
    Kind(r"(^|\.)double_blocks\.", "it is FLUX's or a similar transformer without autoencoder: name ae.safetensors"),
    Kind(r"(^|\.)joint_blocks\.", "it is Stable Diffusion 3's transformer without autoencoder"),
    Kind(r"(^|\.)(label_emb|add_embedding)\.", "it is Stable Diffusion XL's UNet without autoencoder"),
    Kind(
        r"(^|\.)(input_blocks|middle_block)\.|(^|\.)down_blocks\.\d+\.attentions|^model\.diffusion_model\.",
        "it is a diffusion model without one (NoVAE): name the file of the autoencoder itself",
    ),
    Kind(r"(^|\.)transformer_blocks\.\d+\.", "it is a diffusion transformer without one"),
    Kind(r"(^|\.)(resblocks\.\d+|text_model|vision_model)\.", "it is CLIP, an encoder of texts or pictures"),
    Kind(r"^(model\.)?layers\.\d+\.(self_attn|mlp)\.", "it is a language model"),
    Kind(r"(^|\.)(conv_first|RRDB_trunk|body\.\d+\.rdb1)\.", "it is an upscaler of ESRGAN's kind"),
    Kind(r"^(exp_avg|state\.\d+\.exp_avg|optimizer)", "it is an optimizer's state"),
)
DC = Kind(
    r"\.conv_(inverted|depth|point)\.",
    "is a deep compression autoencoder (AutoencoderDC), which has other layers and is not supported",
)
VIDEO = Kind(
    r"\.(time_stack|time_mix_conv|time_mixer|temporal_res_block)\b|\.conv_in\.conv\.weight$|_temporal",
    "is a video model's autoencoder, which has layers over time and is not supported",
)
# Autoencoders that are not ours, by a name within them.
AUTOENCODERS = (
    Kind(
        r"^quantize\.(proj|embed)\.",
        "is a VQGAN with a Gumbel quantiser (quantize.proj and quantize.embed), which is not supported: models whose "
        "codebook is quantize.embedding are",
    ),
    Kind(
        r"^(encoder\.(conv1|downsamples)|decoder\.(conv1|upsamples)|(encoder|decoder)\..*\.resample\.1)\.",
        "is Wan's or Qwen-Image's autoencoder without its config.json, which says how latents are normalised: name the "
        "diffusers folder of AutoencoderKLWan or AutoencoderKLQwenImage",
    ),
    DC,
    VIDEO,
    Kind(
        r"\.(absmax|quant_map|weight_scale|scale_weight|qweight)$", "has quantised weights: get it in float16 or more"
    ),
)
# diffusers' classes of whole pipelines and of autoencoders, by what their names begin with.
FAMILIES = (
    ("StableDiffusionXL", "Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "FLUX"),
    ("StableCascade", "Stable Cascade"),
    ("StableVideo", "Stable Video Diffusion"),
    ("PixArt", "PixArt"),
    ("Kandinsky", "Kandinsky"),
    ("Wan", "Wan"),
)


def name_weights(tensors: Mapping[str, StoredTensor]) -> str:
    """What weights without an autoencoder are; empty where that is not known."""
    if video := name_autoencoder(tensors):
        return f"it {video}"
    return next((kind.what for kind in KINDS if any(re.search(kind.sign, name) for name in tensors)), "")


def name_autoencoder(tensors: Mapping[str, StoredTensor]) -> str:
    """What an autoencoder's tensors are if not those of ours; empty if they may be ours."""
    for kind in AUTOENCODERS:
        if any(re.search(kind.sign, name) for name in tensors):
            return kind.what
    if any(x.ndim == 5 for n, x in tensors.items() if re.match(r"(.*\.)?(encoder|decoder)\.", n)):
        return VIDEO.what
    latent, codes = tensors.get("decoder.conv_in.weight"), tensors.get("quantize.embedding.weight")
    for name, inside in (
        ("quantize.embedding.weight", codes),
        ("post_quant_conv.weight", tensors.get("post_quant_conv.weight")),
    ):
        if latent is not None and inside is not None and inside.ndim > 1 and inside.shape[1] != latent.shape[1]:
            return (
                f"has latents of {inside.shape[1]} channels ({name}) and a decoder that takes {latent.shape[1]}: "
                "models whose embed_dim differs from their z_channels are not supported"
            )
    return ""


def family_of(pipeline: str) -> str:
    """The family of a diffusers pipeline's class, or the class itself."""
    return next((name for beginning, name in FAMILIES if pipeline.startswith(beginning)), pipeline)
