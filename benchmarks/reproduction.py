"""The paper's comparison at small scale: asymvq benchmark reproduction [--out runs/reproduction] [--data.path=PHOTOS].

On the frozen encoder inside the package, for one number of steps, it trains that encoder's plain decoder further, and
the asymmetric base, x1.5 and x2; two of them also with the condition branch fitted; evaluates all of them on held-out
photographs. Started again, it continues where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from asymvq_jax import inference
from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, Settings
from asymvq_jax.data.pipeline import Example, held_out
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


@dataclass(frozen=True)
class Decoder:
    """What one decoder changes of configs/reproduction.py, which is the base's."""

    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    # Its peak rate as a share of the base's: the paper's rates follow its batches, which are 80, 32 and 16.
    rate: float = 1.0
    # Of that, the share for what starts pretrained.
    pretrained_scale: float = 1.0


# The paper's widths, x1, x1.5 and x2, on the plain decoder's; its blocks a level are 2, 3 and 5.
X1_5 = {"decoder_channels": (24, 48, 96, 96), "decoder_blocks": 2}
X2 = {"decoder_channels": (32, 64, 128, 128), "decoder_blocks": 3}
GROWN = {"grow_decoder": True}
DECODERS = {
    "plain, trained on": Decoder({"condition": False}, GROWN, 1.0, 0.15),
    "base": Decoder({}, GROWN, 1.0, 0.15),
    "base, fitted": Decoder({}, GROWN | {"fit_condition": 20}, 0.15),
    "x1.5": Decoder(X1_5, {}, 0.4),
    "x2": Decoder(X2, {}, 0.2),
    "x2, grown and fitted": Decoder(X2, GROWN | {"fit_condition": 20}, 0.15),
}
# The evaluation's pictures.
SIDE, CROP = 256, (0.5, 1.0)
SHOWN = {n: COLUMNS[n] for n in ("preservation_error", "boundary_error", "psnr_preserved", "psnr_masked")}


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Reproduce the paper's comparison at small scale. Started again, it continues where it was."""

    # The directory for the runs, table.json and pictures.png.
    out: str = "runs/reproduction"
    # The base: a published configuration by its name, or a Python file that defines get_config().
    config: str = "reproduction"
    settings: Settings


def work(options: Reproduction) -> int:
    """Returns the exit code of the first training that did not end well, or 0."""
    keep_compiled_programs()
    out = Path(options.out)
    configs = {name: configure(options.settings, decoder, out / _folder(name)) for name, decoder in DECODERS.items()}
    for config in configs.values():
        if code := train(config):
            return code
    report(options.settings, configs, out)
    return 0


def configure(base: Config, decoder: Decoder, directory: Path) -> Config:
    """The configuration of one decoder."""
    optimizer = dataclasses.replace(
        base.optimizer,
        base_learning_rate=decoder.rate * base.optimizer.base_learning_rate,
        min_learning_rate=decoder.rate * base.optimizer.min_learning_rate,
        pretrained_scale=decoder.pretrained_scale,
    )
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, directory=str(directory), **decoder.run),
        model=dataclasses.replace(base.model, **decoder.model),
        optimizer=optimizer,
    )


def _folder(name: str) -> str:
    return name.replace(", ", "_").replace(" ", "_")


def report(base: Config, configs: dict[str, Config], out: Path) -> None:
    """Evaluates every decoder on the same held-out crops and masks; prints and writes the table, draws the pictures."""
    data = dataclasses.replace(base.data, image_size=SIDE, crop=CROP)
    examples = held_out(data, base.run.eval_pictures, base.run.seed)
    models = {VANILLA: base.run.init_from, **{name: config.run.directory for name, config in configs.items()}}
    rows, columns = {}, {"original": list(examples["image"][:GRID_ROWS])}
    columns["masked"] = [np.where(m > 0, np.uint8(127), x) for x, m in zip(*examples.values(), strict=True)][:GRID_ROWS]
    for name, path in models.items():
        rows[name], decoded = _measure(load_model(path), examples)
        columns[name] = list(decoded[:GRID_ROWS])
    header = ["", *(title for title, _ in SHOWN.values()), "parameters of the decoder, M", "decode, images/s"]
    cells = [
        [name, *(f"{row[c] * scale:.4g}" for c, (_, scale) in SHOWN.items()),
         f"{row['parameters'] / 1e6:.2f}", f"{row['images_per_second']:.3g}"]
        for name, row in rows.items()
    ]  # fmt: skip
    count = len(examples["image"])
    print(f"\n{count} crops of {SIDE} x {SIDE} px from {base.data.eval_path or 'the held-out photographs'}")
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


def _speed(model: Autoencoder, latent: jax.Array, condition: tuple[Any, Any]) -> float:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(inference.decode(model, latent, *condition))
        seconds.append(time.perf_counter() - begin)
    return len(latent) / float(np.median(seconds))


main = command("asymvq benchmark reproduction", Reproduction, work, clock=True)
