"""The paper's comparison at small scale: asymvq benchmark reproduction --photos DIR [--out runs/reproduction].

Trains a small symmetric autoencoder (configs/reproduction.py), then, on its frozen encoder and for one number of steps,
its plain decoder further, the asymmetric base, x1.5, x2, and x2 grown from the plain decoder instead of from random
weights; evaluates all of them on held-out photographs. Started again, it continues where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import jax
import numpy as np

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, Settings
from asymvq_jax.data.pipeline import Example, held_out
from asymvq_jax.data.sources import list_pictures
from asymvq_jax.devices.compilation import keep_compiled_programs
from asymvq_jax.evaluation.metrics.image import all_metrics
from asymvq_jax.evaluation.rows import COLUMNS, GRID_ROWS, markdown
from asymvq_jax.files import images
from asymvq_jax.files.outputs import write_bytes
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model
from asymvq_jax.models.parameters import split
from asymvq_jax.training.loop import train

VANILLA = "vanilla"
# The paper's sizes at an eighth of the width; the depth is the published one.
BASE = {"decoder_channels": (16, 32, 64, 64), "decoder_blocks": 2}
X1_5 = {"decoder_channels": (24, 48, 96, 96), "decoder_blocks": 3}
X2 = {"decoder_channels": (32, 64, 128, 128), "decoder_blocks": 5}
# What each decoder changes of the model, whether it starts from the plain decoder, and its peak rate as a share of the
# base's: the paper's rates follow its batches, which are 80, 32 and 16.
DECODERS: dict[str, tuple[dict, bool, float]] = {
    "plain, trained on": ({**BASE, "condition": False}, True, 1.0),
    "base": ({**BASE, "condition": True}, True, 1.0),
    "x1.5": ({**X1_5, "condition": True}, False, 0.4),
    "x2": ({**X2, "condition": True}, False, 0.2),
    "x2, grown": ({**X2, "condition": True}, True, 0.2),
}
# Base and plain start from the plain decoder's own sizes and take this share of the rate but in the condition branch.
PRETRAINED_SCALE = 0.4
HELD_OUT_EVERY = 5
SHORTER_SIDE = 256
SHOWN = {n: COLUMNS[n] for n in ("preservation_error", "boundary_error", "psnr_preserved", "psnr_masked")}


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Reproduce the paper's comparison at small scale. Started again, it continues where it was."""

    # A folder of photographs.
    photos: str
    # The directory for the runs, table.json and pictures.png.
    out: str = "runs/reproduction"
    # The first stage: a published configuration by its name, or a Python file that defines get_config().
    config: str = "reproduction"
    # Training steps of each decoder.
    steps: int = 800
    # Pictures in a training step of each decoder.
    batch: int = 4
    settings: Settings


def work(options: Reproduction) -> int:
    """Returns the exit code of the first training that did not end well, or 0."""
    keep_compiled_programs()
    out = Path(options.out)
    given = options.settings
    data = dataclasses.replace(given.data, path=str(out / "train"), eval_path=str(out / "held_out"))
    run = dataclasses.replace(given.run, directory=str(out / "first_stage"))
    first = dataclasses.replace(given, data=data, run=run)
    shrink_photos(options.photos, out)
    configs = decoders(first, out, options.steps, options.batch)
    for config in (first, *configs.values()):
        if code := train(config):
            return code
    report(first, configs, out)
    return 0


def shrink_photos(folder: str, out: Path) -> None:
    """Copies of the photographs in `out`, 256 px on the shorter side: every fifth in held_out/, the rest in train/."""
    for i, path in enumerate(list_pictures(folder, "--photos")):
        copy = out / ("held_out" if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train") / f"{path.stem}.png"
        if not copy.exists():
            image = images.read(path)
            scale = SHORTER_SIDE / min(image.shape[:2])
            images.write(copy, cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))


def decoders(first: Config, out: Path, steps: int, batch: int) -> dict[str, Config]:
    """The configuration of every decoder on the first stage's encoder; the base's peak rate is the first stage's."""
    peak = first.optimizer.base_learning_rate * first.data.batch_size
    result = {}
    for name, (changes, pretrained, share) in DECODERS.items():
        run = {"directory": str(out / name.replace(", ", "_").replace(" ", "_")), "steps": steps, "eval_every": steps}
        run |= {"train_encoder": False, "init_from": first.run.directory, "grow_decoder": pretrained}
        scale = PRETRAINED_SCALE if pretrained and share == 1 else 1.0
        result[name] = Config(
            run=dataclasses.replace(first.run, **run),
            model=dataclasses.replace(first.model, **changes),
            loss=first.loss,
            data=dataclasses.replace(first.data, batch_size=batch),
            optimizer=dataclasses.replace(
                first.optimizer, base_learning_rate=share * peak / batch, pretrained_scale=scale
            ),
        )
    return result


def report(first: Config, configs: dict[str, Config], out: Path) -> None:
    """Evaluates every decoder on the same held-out crops and masks; prints and writes the table, draws the pictures."""
    examples = held_out(first.data, first.run.eval_pictures, first.run.seed)
    rows, columns = {}, {"original": list(examples["image"][:GRID_ROWS])}
    columns["masked"] = [np.where(m > 0, np.uint8(127), x) for x, m in zip(*examples.values(), strict=True)][:GRID_ROWS]
    for name, config in {VANILLA: first, **configs}.items():
        rows[name], decoded = _measure(load_model(config.run.directory), examples)
        columns[name] = list(decoded[:GRID_ROWS])
    header = ["", *(title for title, _ in SHOWN.values()), "parameters of the decoder, M", "decode, images/s"]
    cells = [
        [name, *(f"{row[c] * scale:.4g}" for c, (_, scale) in SHOWN.items()),
         f"{row['parameters'] / 1e6:.2f}", f"{row['images_per_second']:.3g}"]
        for name, row in rows.items()
    ]  # fmt: skip
    size, count = first.data.image_size, len(examples["image"])
    print(f"\n{count} crops of {size} x {size} px from the held-out photographs")
    print(markdown(header, cells))
    write_bytes(out / "table.json", json.dumps({"pictures": count, "rows": rows}, indent=2).encode() + b"\n")
    images.write(out / "pictures.png", images.grid(list(columns.items())))
    print(f"\ntable     {out / 'table.json'}\npictures  {out / 'pictures.png'}")


def _measure(model: Autoencoder, examples: Example) -> tuple[dict[str, float], np.ndarray]:
    """Means of the metrics, the decoder's size and speed; and the decoded pictures, uint8."""
    image, mask = images.to_float(examples["image"]), examples["mask"].astype(np.float32)
    latent = inference.encode(model, image)
    condition = (image, mask) if model.config.condition else (None, None)
    decoded = images.to_uint8(inference.decode(model, latent, *condition))
    measured = [all_metrics(*arrays) for arrays in zip(decoded, *examples.values(), strict=True)]
    values = {name: float(np.mean([m[name] for m in measured])) for name in SHOWN}
    values["parameters"] = sum(math.prod(x.shape) for n, x in split(model)[1].items() if n.startswith("decoder."))
    return values | {"images_per_second": _speed(model, latent, condition)}, decoded


def _speed(model: Autoencoder, latent: jax.Array, condition: tuple) -> float:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(inference.decode(model, latent, *condition))
        seconds.append(time.perf_counter() - begin)
    return len(latent) / float(np.median(seconds))


main = command("asymvq benchmark reproduction", Reproduction, work, clock=True)
