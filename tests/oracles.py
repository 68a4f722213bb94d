"""What the tests compare with: diffusers' classes, and published formulas written in torch."""

import numpy as np
import torch
from diffusers import AsymmetricAutoencoderKL
from torch import nn
from torch.nn import functional as F

from asymvq_jax.config import ModelConfig
from benchmarks.reference import TorchLPIPS as TorchLPIPS
from benchmarks.reference import TorchPatchGAN as TorchPatchGAN
from benchmarks.reference import nchw as nchw

# The paper's three sizes: a quarter of the width, all of the depth.
SIZES = {
    "base": ModelConfig(encoder_channels=(32, 64, 128, 128), decoder_channels=(32, 64, 128, 128)),
    "x1.5": ModelConfig(
        encoder_channels=(32, 64, 64, 64), decoder_channels=(48, 96, 192, 192), decoder_blocks=3, norm_groups=16
    ),
    "x2": ModelConfig(encoder_channels=(32, 64, 64, 64), decoder_channels=(64, 128, 256, 256), decoder_blocks=5),
}
TINY = ModelConfig(
    encoder_channels=(32, 32, 32, 32), decoder_channels=(32, 64, 64, 64), encoder_blocks=1, decoder_blocks=1
)


def asymmetric(config: ModelConfig, seed: int = 0) -> AsymmetricAutoencoderKL:
    """diffusers' model of the same sizes, with random weights; norms are moved off their initial 1 and 0."""
    torch.manual_seed(seed)
    levels = len(config.encoder_channels)
    model = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        down_block_out_channels=config.encoder_channels,
        layers_per_down_block=config.encoder_blocks,
        up_block_types=("UpDecoderBlock2D",) * levels,
        up_block_out_channels=config.decoder_channels,
        layers_per_up_block=config.decoder_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
    )
    return perturb_norms(model).eval()


def perturb_norms(model: nn.Module) -> nn.Module:
    """Random affine parameters for every normalisation, so that a mix-up shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model


def numpy_state(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def relative_error(ours, theirs) -> float:
    """Greatest absolute difference as a share of the expected values' range."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.ptp(theirs))


class TorchInception(nn.Module):
    """The Inception-v3 of FID as published, with the tensor names of pytorch-fid and torch-fidelity."""

    def __init__(self) -> None:
        super().__init__()
        for name, *sizes in (
            ("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0), ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
            ("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
        ):  # fmt: skip
            self.layer(name, *sizes)
        for name, width, pooled in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            self.branches(name, {
                "1x1": (width, 64, 1), "5x5_1": (width, 48, 1), "5x5_2": (48, 64, 5), "3x3dbl_1": (width, 64, 1),
                "3x3dbl_2": (64, 96, 3), "3x3dbl_3": (96, 96, 3), "_pool": (width, pooled, 1),
            })  # fmt: skip
        self.branches("Mixed_6a", {"3x3dbl_1": (288, 64, 1), "3x3dbl_2": (64, 96, 3)})
        self.layer("Mixed_6a.branch3x3", 288, 384, 3, 2, 0)
        self.layer("Mixed_6a.branch3x3dbl_3", 96, 96, 3, 2, 0)
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            row, column = (1, 7), (7, 1)
            self.branches(name, {
                "1x1": (768, 192, 1), "7x7_1": (768, c, 1), "7x7_2": (c, c, row), "7x7_3": (c, 192, column),
                "7x7dbl_1": (768, c, 1), "7x7dbl_2": (c, c, column), "7x7dbl_3": (c, c, row),
                "7x7dbl_4": (c, c, column), "7x7dbl_5": (c, 192, row), "_pool": (768, 192, 1),
            })  # fmt: skip
        self.branches("Mixed_7a", {"3x3_1": (768, 192, 1), "7x7x3_1": (768, 192, 1), "7x7x3_2": (192, 192, (1, 7)),
                                   "7x7x3_3": (192, 192, (7, 1))})  # fmt: skip
        self.layer("Mixed_7a.branch3x3_2", 192, 320, 3, 2, 0)
        self.layer("Mixed_7a.branch7x7x3_4", 192, 192, 3, 2, 0)
        for name, width in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
            self.branches(name, {
                "1x1": (width, 320, 1), "3x3_1": (width, 384, 1), "3x3_2a": (384, 384, (1, 3)),
                "3x3_2b": (384, 384, (3, 1)), "3x3dbl_1": (width, 448, 1), "3x3dbl_2": (448, 384, 3),
                "3x3dbl_3a": (384, 384, (1, 3)), "3x3dbl_3b": (384, 384, (3, 1)), "_pool": (width, 192, 1),
            })  # fmt: skip
        self.fc = nn.Linear(2048, 1008)

    def branches(self, name: str, layers: dict) -> None:
        for branch, (inputs, outputs, kernel) in layers.items():
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            self.layer(f"{name}.branch{branch}", inputs, outputs, kernel, 1, tuple(side // 2 for side in sides))

    def layer(self, name: str, inputs: int, outputs: int, kernel, stride: int, padding) -> None:
        parent, _, leaf = name.rpartition(".")
        if parent and not hasattr(self, parent):
            self.add_module(parent, nn.Module())
        layer = nn.Module()
        layer.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        layer.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.get_submodule(parent).add_module(leaf, layer)

    def randomized(self) -> "TorchInception":
        """Normalisations moved off their initial 1 and 0, and kernels through which a picture is still seen."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # PyTorch's own are so small that the last features hardly depend on the picture.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.uniform_(-0.3, 0.3)
        return self

    def run(self, x: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            layer = self.get_submodule(name)
            x = F.relu(layer.bn(layer.conv(x)))
        return x

    @staticmethod
    def mean3(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    @staticmethod
    def resize(x: torch.Tensor, size: int = 299) -> torch.Tensor:
        """TensorFlow 1's bilinear resizing, align_corners off, by explicit weights."""
        for axis in (2, 3):
            length = x.shape[axis]
            at = torch.arange(size, dtype=torch.float64) * length / size
            low = at.floor()
            weights = torch.zeros(size, length, dtype=torch.float64)
            weights[torch.arange(size), low.long()] += 1 - (at - low)
            weights[torch.arange(size), (low.long() + 1).clamp(max=length - 1)] += at - low
            x = torch.movedim(torch.tensordot(x, weights, ([axis], [1])), -1, axis)
        return x

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 3, h, w) uint8 -> (b, 2048) features and (b, 1008) logits without their bias."""
        x = (self.resize(picture.double()).float() - 128) / 128
        x = F.max_pool2d(self.run(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), 3, 2)
        x = F.max_pool2d(self.run(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            b = f"{block}.branch"
            x = torch.cat([
                self.run(x, f"{b}1x1"), self.run(x, f"{b}5x5_1", f"{b}5x5_2"),
                self.run(x, f"{b}3x3dbl_1", f"{b}3x3dbl_2", f"{b}3x3dbl_3"), self.run(self.mean3(x), f"{b}_pool"),
            ], 1)  # fmt: skip
        b = "Mixed_6a.branch"
        x = torch.cat([self.run(x, f"{b}3x3"), self.run(x, f"{b}3x3dbl_1", f"{b}3x3dbl_2", f"{b}3x3dbl_3"),
                       F.max_pool2d(x, 3, 2)], 1)  # fmt: skip
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            b = f"{block}.branch"
            x = torch.cat([
                self.run(x, f"{b}1x1"), self.run(x, *(f"{b}7x7_{i}" for i in range(1, 4))),
                self.run(x, *(f"{b}7x7dbl_{i}" for i in range(1, 6))), self.run(self.mean3(x), f"{b}_pool"),
            ], 1)  # fmt: skip
        b = "Mixed_7a.branch"
        x = torch.cat([self.run(x, f"{b}3x3_1", f"{b}3x3_2"), self.run(x, *(f"{b}7x7x3_{i}" for i in range(1, 5))),
                       F.max_pool2d(x, 3, 2)], 1)  # fmt: skip
        for block, pooled in (("Mixed_7b", self.mean3), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
            b = f"{block}.branch"
            three, double = self.run(x, f"{b}3x3_1"), self.run(x, f"{b}3x3dbl_1", f"{b}3x3dbl_2")
            x = torch.cat([
                self.run(x, f"{b}1x1"), *(self.run(three, f"{b}3x3_2{i}") for i in "ab"),
                *(self.run(double, f"{b}3x3dbl_3{i}") for i in "ab"), self.run(pooled(x), f"{b}_pool"),
            ], 1)  # fmt: skip
        x = x.mean((2, 3))
        return x, x @ self.fc.weight.T
