"""Published formulas written in torch, independent of this package, for its tests and its benchmarks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def nchw(x: np.ndarray) -> torch.Tensor:
    """An array (b, h, w, c) as torch has it, (b, c, h, w), float32."""
    return torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2).contiguous()


class TorchLPIPS(nn.Module):
    """LPIPS as published (Zhang et al. 2018), on torch tensors of our parameters' values."""

    VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    VGG_KEPT = (1, 3, 6, 9, 12)

    def __init__(self, params: dict[str, np.ndarray], net: str = "vgg16") -> None:
        super().__init__()
        self.net = net
        for name, value in params.items():
            tensor = torch.from_numpy(np.array(value))
            if name.startswith("heads"):
                tensor = tensor[None, :, None, None]
            elif tensor.ndim == 4:
                tensor = tensor.permute(3, 2, 0, 1)
            self.register_buffer(name.replace(".", "_"), tensor)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def conv(self, i: int, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.relu(F.conv2d(x, getattr(self, f"convs_{i}_kernel"), getattr(self, f"convs_{i}_bias"), **options))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = (x - self.shift) / self.scale
        kept = []
        if self.net == "vgg16":
            i = 0
            for layer in self.VGG:
                if layer == "M":
                    x = F.max_pool2d(x, 2, 2)
                    continue
                x = self.conv(i, x, padding=1)
                if i in self.VGG_KEPT:
                    kept.append(x)
                i += 1
            return kept
        for i, (stride, padding, pool) in enumerate(((4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0))):
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = self.conv(i, x, stride=stride, padding=padding)
            kept.append(x)
        return kept

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(a), 1, 1, 1, device=a.device)
        for i, (x, y) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            head = getattr(self, f"heads_{i}")
            x = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            y = y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10)
            total = total + ((x - y).square() * head).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


class TorchPatchGAN(nn.Module):
    """The pix2pix discriminator with 3 layers, its modules named main.N as in the original checkpoints."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, features, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = features
        for i in range(1, 4):
            outputs = features * min(2**i, 8)
            layers += [
                nn.Conv2d(width, outputs, 4, 2 if i < 3 else 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2),
            ]
            width = outputs
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)

    # Ours by theirs: (our name, our leaf, position, their leaf).
    NAMES = (
        [("convs.0", "kernel", 0, "weight"), ("convs.0", "bias", 0, "bias")]
        + [(f"convs.{i}", "kernel", 3 * i - 1, "weight") for i in (1, 2, 3)]
        + [
            (f"norms.{i}", ours, 3 * i + 3, theirs)
            for i in range(3)
            for ours, theirs in (
                ("scale", "weight"),
                ("bias", "bias"),
                ("mean", "running_mean"),
                ("variance", "running_var"),
            )
        ]
        + [("conv_out", "kernel", 11, "weight"), ("conv_out", "bias", 11, "bias")]
    )

    def load(self, params: dict[str, np.ndarray]) -> TorchPatchGAN:
        state = self.state_dict()
        for ours, leaf, position, theirs in self.NAMES:
            value = np.array(params[f"{ours}.{leaf}"])
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
            state[f"main.{position}.{theirs}"] = torch.from_numpy(value.copy())
        self.load_state_dict(state)
        return self

    def as_ours(self, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Tensors under `main.N.leaf` names (parameters, gradients or statistics) in our layout."""
        result = {}
        for ours, leaf, position, theirs in self.NAMES:
            if (name := f"main.{position}.{theirs}") in values:
                value = values[name].detach().numpy()
                result[f"{ours}.{leaf}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        return result
