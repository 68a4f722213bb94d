"""A node for ComfyUI that decodes a latent beside the original's pixels, by a running `asymvq serve`.

Copy this file into ComfyUI/custom_nodes, start `asymvq serve --checkpoint runs/x2`, and put the node "Decode and keep
pixels (asymvq)" where "VAE Decode" was. It needs nothing that ComfyUI does not have.
"""

from __future__ import annotations

import io
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

SECONDS = 600


def form(files: Mapping[str, bytes], fields: Mapping[str, str]) -> tuple[bytes, str]:
    """A request's body as multipart/form-data, and its content type."""
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files.items()
    ]
    parts += [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    return b"".join([*parts, f"--{mark}--\r\n".encode()]), f"multipart/form-data; boundary={mark}"


def png(array: np.ndarray) -> bytes:
    """A PNG of (h, w, 3) or (h, w) floats in [0, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def decode(
    address: str, image: np.ndarray, mask: np.ndarray, latent: np.ndarray | None, fields: Mapping[str, str]
) -> np.ndarray:
    """Asks the service for one picture.

    Args:
        address: of the service, such as http://127.0.0.1:8000.
        image: (h, w, 3) floats in [0, 1].
        mask: (h, w) floats in [0, 1], 1 = generate.
        latent: (c, h/8, w/8), not scaled, as ComfyUI has latents in memory; None: the picture's own.
        fields: see the service.

    Returns:
        (h, w, 3) float32 in [0, 1].

    Raises:
        RuntimeError: the service refuses, and says why; or no service answers.
    """
    files = {"image": png(image), "mask": png(mask)}
    if latent is not None:
        buffer = io.BytesIO()
        np.save(buffer, latent.astype(np.float32))
        files["latent"] = buffer.getvalue()
    body, kind = form(files, fields)
    request = urllib.request.Request(f"{address.rstrip('/')}/inpaint", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer, Image.open(answer) as picture:
            return np.asarray(picture.convert("RGB"), np.float32) / 255
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"asymvq serve: {error.code} {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise RuntimeError(f"no asymvq serve at {address}: {error}") from None


class AsymvqDecode:
    """Latent, original picture and mask to the finished picture."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "latent/inpaint"
    BLENDS: ClassVar = ["none", "feather", "multiband", "tone", "poisson"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The sockets, as ComfyUI asks for them."""
        return {
            "required": {
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "keep": (["model", "exact"],),
                "blend": (cls.BLENDS,),
                "address": ("STRING", {"default": "http://127.0.0.1:8000"}),
            },
            "optional": {"samples": ("LATENT",)},
        }

    def run(
        self, image: Any, mask: Any, keep: str, blend: str, address: str, samples: dict[str, Any] | None = None
    ) -> tuple[Any]:
        """(b, h, w, 3) and (b, h, w) tensors to the same of finished pictures; a single mask is for all."""
        import torch

        fields = {"keep": keep, "latent_scaled": "no", "latent_layout": "channels-first"}
        if keep == "exact":
            fields["blend"] = blend
        latents = None if samples is None else samples["samples"].cpu().numpy()
        pictures = [
            decode(
                address,
                picture,
                mask[min(number, len(mask) - 1)].cpu().numpy(),
                None if latents is None else latents[number],
                fields,
            )
            for number, picture in enumerate(image.cpu().numpy())
        ]
        return (torch.from_numpy(np.stack(pictures)),)


NODE_CLASS_MAPPINGS = {"AsymvqDecode": AsymvqDecode}
NODE_DISPLAY_NAME_MAPPINGS = {"AsymvqDecode": "Decode and keep pixels (asymvq)"}
