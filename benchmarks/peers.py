"""The PyTorch peers: diffusers' decoder, and the reference's training loop written in torch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from torch.nn import functional as F

from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.parameters import split
from benchmarks.contest import Run
from benchmarks.reference import TorchLPIPS, TorchPatchGAN, nchw

# Its notes on config.json are about nothing that is timed.
logging.set_verbosity_error()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _compiled(function: Callable, compiled: bool) -> Callable:
    # The mode in which torch tries several kernels for each convolution and product.
    return torch.compile(function, mode="max-autotune-no-cudagraphs") if compiled else function


def decode(folder: str, arrays: dict[str, np.ndarray], *, dtype: str, channels_last: bool, compiled: bool) -> Run:
    """diffusers' decode of `arrays` (latent, image, mask; NHWC) with the weights of `folder`."""
    device, torch_dtype = _device(), getattr(torch, dtype)
    torch.backends.cudnn.benchmark = True
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = (
        AsymmetricAutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
        .to(device, torch_dtype, memory_format=form)
        .eval()
    )
    z, image, mask = (
        nchw(arrays[name]).to(device, torch_dtype, memory_format=form) for name in ("latent", "image", "mask")
    )

    def work() -> torch.Tensor:
        return model.decoder(model.post_quant_conv(z), image, mask)

    work = _compiled(work, compiled)

    def run() -> Callable[[], np.ndarray]:
        with torch.inference_mode():
            y = work()
        _settle(device)
        return lambda: y.float().permute(0, 2, 3, 1).cpu().numpy()

    return run


class Trainer:
    """The reference's training step with the discriminator, on one device.

    As published, an optimizer's turn has a forward pass of its own, the discriminator's with the decoder just updated.
    With `once`, one forward pass serves both, as ours does. Mixed precision is torch's autocast.
    """

    def __init__(self, folder: str, arrays: dict[str, np.ndarray], *, dtype: str, once: bool, compiled: bool) -> None:
        self.device, self.dtype, self.once = _device(), getattr(torch, dtype), once
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        place = {"device": self.device, "memory_format": torch.channels_last}
        self.model = AsymmetricAutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).to(**place)
        self.model.requires_grad_(False)
        self.model.decoder.requires_grad_(True)
        self.gan = TorchPatchGAN().to(**place).train()
        self.lpips = TorchLPIPS(_lpips_parameters()).to(**place)
        self.image, self.mask = (nchw(arrays[name]).to(**place) for name in ("image", "mask"))
        adam = {"lr": 1e-5, "betas": (0.5, 0.9), "fused": self.device.type == "cuda"}
        self.optimizer = torch.optim.Adam(self.model.decoder.parameters(), **adam)
        self.gan_optimizer = torch.optim.Adam(self.gan.parameters(), **adam)
        self.reconstruct = _compiled(self._reconstruct, compiled)
        self.judge = _compiled(self.gan, compiled)
        self.nll = _compiled(self._nll, compiled)

    def _reconstruct(self) -> torch.Tensor:
        with torch.no_grad():
            posterior = self.model.encode(self.image).latent_dist
            z = self.model.post_quant_conv(posterior.mean + posterior.std * torch.randn_like(posterior.mean))
        return self.model.decoder(z, self.image, self.mask).float()

    def _nll(self, recon: torch.Tensor) -> torch.Tensor:
        return ((recon - self.image).abs() + self.lpips(recon, self.image)).sum() / len(self.image)

    def step(self) -> torch.Tensor:
        """One step of both optimizers; returns the reconstruction loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            recon = self.reconstruct()
            nll = self.nll(recon)
            self.gan.requires_grad_(False)
            generator = -self.judge(recon).float().mean()
        last = self.model.decoder.conv_out.weight
        at_nll, at_gan = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, generator))
        weight = 0.8 * (at_nll.norm() / (at_gan.norm() + 1e-4)).clamp(0, 1e4)
        self.optimizer.zero_grad()
        (nll + weight * generator).backward()
        self.optimizer.step()
        self.gan.requires_grad_(True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.once:
                with torch.no_grad():
                    recon = self.reconstruct()
            real, fake = self.judge(self.image), self.judge(recon.detach())
            hinge = 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
        self.gan_optimizer.zero_grad()
        hinge.backward()
        self.gan_optimizer.step()
        return nll.detach()


def train(folder: str, arrays: dict[str, np.ndarray], **options: bool | str) -> Run:
    """Steps of a `Trainer`; the result is its first reconstruction loss."""
    trainer = Trainer(folder, arrays, **options)
    first: list[np.ndarray] = []

    def run() -> Callable[[], np.ndarray]:
        nll = trainer.step()
        _settle(trainer.device)
        first.append(nll.cpu().numpy()[None])
        return lambda: first[0]

    return run


def _lpips_parameters() -> dict[str, np.ndarray]:
    # Only to read the published weights; this process leaves the accelerator to torch.
    jax.config.update("jax_platforms", "cpu")
    return {name: np.asarray(value) for name, value in split(load_lpips("vgg16"))[1].items()}


def random_stable_diffusion(folder: str) -> None:
    """diffusers' UNet and autoencoder at Stable Diffusion 1.5's sizes, by their own initialisation, in a folder."""
    torch.manual_seed(0)
    UNet2DConditionModel(cross_attention_dim=768, sample_size=64).save_pretrained(f"{folder}/unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    ).save_pretrained(f"{folder}/vae")


def generate(
    folder: str,
    arrays: dict[str, np.ndarray],
    *,
    schedule: dict,
    guidance: float,
    steps: int,
    dtype: str,
    compiled: bool,
) -> Run:
    """diffusers' pipeline with the weights of `folder`, from noise and features in `arrays` (NHWC; b, 2, n, d)."""
    device, torch_dtype = _device(), getattr(torch, dtype)
    torch.backends.cudnn.benchmark = True
    place = {"device": device, "dtype": torch_dtype, "memory_format": torch.channels_last}
    unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet").to(**place).eval()
    vae = AutoencoderKL.from_pretrained(f"{folder}/vae").to(**place).eval()
    scheduler = DPMSolverMultistepScheduler(steps_offset=1, **schedule)
    pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = _compiled(unet, compiled)
    pipeline.vae.decode = _compiled(vae.decode, compiled)
    noise = nchw(arrays["noise"]).to(device, torch_dtype)
    nothing, text = torch.from_numpy(arrays["context"]).to(device, torch_dtype).unbind(1)

    def run() -> Callable[[], np.ndarray]:
        with torch.inference_mode():
            y = pipeline(
                prompt_embeds=text,
                negative_prompt_embeds=nothing,
                latents=noise.clone(),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
            y = pipeline.vae.decode(y / vae.config.scaling_factor).sample
        _settle(device)
        return lambda: y.float().permute(0, 2, 3, 1).cpu().numpy()

    return run
