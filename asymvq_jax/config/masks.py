"""The random masks of a run: their fields, and LaMa's published distributions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from asymvq_jax.config.forms import PathText, require, settle


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """LaMa's random masks (arXiv 2109.07161) and the full mask; the defaults are LaMa's "thick 256".

    `MASK_PRESETS` has all of its published distributions. Ranges are (least, most), both included.
    """

    # Probability of the full mask (all ones: the text-to-image case).
    full_probability: float = 0.5
    # The mixture of the other masks: each kind is drawn in proportion to its weight.
    strokes: float = 1.0
    boxes: float = 0.3
    squares: float = 0.0
    superres: float = 0.0
    outpainting: float = 0.0
    files: float = 0.0
    # Probability that masked and preserved change places in one of them.
    invert_probability: float = 0.0
    # Side of the picture whose pixels the lengths below are given in; for another picture they scale with its side.
    resolution: int = 256
    # Strokes in a mask.
    stroke_count: tuple[int, int] = (1, 6)
    # Most segments in a stroke.
    stroke_segments: int = 5
    # How many lengths a segment may have, from 10 px on.
    stroke_length: int = 200
    # How many widths a stroke's brush may have, from 5 px on.
    stroke_width: int = 100
    # How many directions a segment may have.
    stroke_angle: int = 4
    # Rectangles in a mask.
    box_count: tuple[int, int] = (1, 3)
    # A rectangle's sides, px.
    box_side: tuple[int, int] = (30, 150)
    # Least distance from the picture's edge.
    box_margin: int = 10
    # Squares are strokes that leave one square, as wide as the brush, where each segment begins.
    square_count: tuple[int, int] = (1, 11)
    square_length: int = 60
    square_width: int = 20
    # Period of the masked bands of rows, and of columns; px, which do not scale.
    superres_step: tuple[int, int] = (2, 4)
    # Width of these bands, always less than their period; px, which do not scale.
    superres_width: tuple[int, int] = (1, 3)
    # Probabilities that the left, top, right and bottom margin is masked; one always is.
    outpainting_sides: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.5)
    # The masked margins' width, as a share of the picture's side.
    outpainting_padding: tuple[float, float] = (0.04, 0.25)
    # files: a directory tree of mask pictures (also gs://...), white = generate, resized to the crop; threshold 0.5.
    path: PathText = ""

    def __post_init__(self) -> None:
        settle(self, "data.mask")
        for name in ("full_probability", "invert_probability"):
            require(0 <= getattr(self, name) <= 1, f"data.mask.{name}", getattr(self, name), "a number in [0, 1]")
        for name, weight in self.weights.items():
            require(weight >= 0, f"data.mask.{name}", weight, "a weight of zero or more")
        require(
            sum(self.weights.values()) > 0,
            "data.mask.strokes",
            self.strokes,
            f"a positive weight here or of another kind: {', '.join(self.weights)}",
        )
        require(bool(self.path) or not self.files, "data.mask.path", self.path, "a directory, as data.mask.files > 0")
        require(bool(self.files) or not self.path, "data.mask.files", self.files, "more than 0 with a data.mask.path")
        for name in (
            "resolution", "stroke_segments", "stroke_length", "stroke_width", "stroke_angle", "square_length",
            "square_width",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"data.mask.{name}", getattr(self, name), "at least 1")
        for name in ("stroke_count", "box_count", "box_side", "square_count", "superres_step", "superres_width"):
            pair = getattr(self, name)
            require(1 <= pair[0] <= pair[1], f"data.mask.{name}", pair, "(least, most) with 1 <= least")
        require(
            0 <= 2 * self.box_margin <= self.resolution - self.box_side[0],
            "data.mask.box_margin",
            self.box_margin,
            f"zero or more, with room for a box of {self.box_side[0]} px between two margins in {self.resolution} px",
        )
        require(
            self.superres_width[0] < self.superres_step[0],
            "data.mask.superres_width",
            self.superres_width,
            f"a least width below {self.superres_step[0]}, the least data.mask.superres_step",
        )
        require(
            all(0 <= p <= 1 for p in self.outpainting_sides) and any(self.outpainting_sides),
            "data.mask.outpainting_sides",
            self.outpainting_sides,
            "four probabilities, not all of them 0",
        )
        require(
            0 <= self.outpainting_padding[0] <= self.outpainting_padding[1] <= 1,
            "data.mask.outpainting_padding",
            self.outpainting_padding,
            "(least, most) with 0 <= least <= most <= 1",
        )

    @property
    def weights(self) -> dict[str, float]:
        """The mixture: the weight of every kind of mask but the full one."""
        kinds = ("strokes", "boxes", "squares", "superres", "outpainting", "files")
        return {kind: getattr(self, kind) for kind in kinds}


# A preset leaves alone what LaMa does not have: the full mask, and files.
_THICK_256 = {
    f.name: f.default for f in dataclasses.fields(MaskConfig) if f.name not in ("full_probability", "files", "path")
}
# LaMa's published distributions (its configs/data_gen/random_*.yaml). Its code draws up to one stroke more than
# max_times there.
MASK_PRESETS: dict[str, dict[str, Any]] = {
    "thin_256": _THICK_256 | {"boxes": 0.0, "stroke_count": (4, 51), "stroke_length": 40, "stroke_width": 10},
    "medium_256": _THICK_256 | {"stroke_count": (4, 6), "stroke_length": 100, "stroke_width": 50,
                                "box_count": (1, 5), "box_side": (10, 50), "box_margin": 0},
    "thick_256": _THICK_256,
    "thin_512": _THICK_256 | {"resolution": 512, "boxes": 0.0, "stroke_count": (4, 71), "stroke_length": 100,
                              "stroke_width": 20},
    "medium_512": _THICK_256 | {"resolution": 512, "stroke_count": (4, 11), "stroke_length": 200, "stroke_width": 100,
                                "box_count": (1, 5), "box_side": (30, 150), "box_margin": 0},
    "thick_512": _THICK_256 | {"resolution": 512, "stroke_count": (1, 6), "stroke_length": 450, "stroke_width": 250,
                               "box_count": (1, 4), "box_side": (30, 300), "box_margin": 10},
}  # fmt: skip
