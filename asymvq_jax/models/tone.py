"""A smooth field of colour that sets a fill's tone right, predicted from what disagrees along the mask's edge.

The decoder's convolutions see the edge from a few dozen pixels away at most, and a fill whose tone is off has to be
moved as a whole. So a small network looks at coarse means: of the fill inside the mask and of the kept pixels outside
it, which meet in the cells of 4 x 4 pixels that the edge crosses. It gives each such cell a confidence, by which an
object's edge differs from a seam. To the differences of the two means a constant and a slope are fitted, robustly; what
these leave is spread into the mask by push and pull (averages over ever larger cells); and a U-Net, which also sees how
well the cells agree, says how much of either to add, and what else. The field is added to the decoded picture under the
mask, so colour moves smoothly and texture stays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from asymvq_jax.models.blocks import Conv

# Side of the cells of the means, px; the field has half as many.
CELL = 4
# The grids of cells begin so many px above and left of the picture: a mask whose edge follows the lines of one grid,
# and so crosses none of its cells, crosses the other's.
SHIFTS = (0, CELL // 2)
# Widths of the network that finds the confidences, and of the U-Net by resolution: cells, and halves of the one before.
FINDER, WIDTHS = 24, (24, 32, 48, 48)
# Where the confidences of a cell add up to this, it counts as much as what larger cells say.
TRUST = 8.0
# Of the robust fit: rounds, degrees of freedom of the cells' Student t and its least deviation, for colours in [-1, 1],
# and the precision that a constant and slopes of zero are given, in cells.
ROUNDS, FREEDOM, LEAST, PRIOR = 8, 3.0, 0.015, (0.05, 0.5, 0.5)
# Of the inputs' and outputs' scales: differences of tone are small beside the pictures' range.
GAIN, OUTPUT = 3.0, 0.1
EPSILON = 1e-4


class Means(NamedTuple):
    """Means of the fill and of the kept pixels in every cell, (b, h/4, w/4, 3), and their shares of it, (..., 1)."""

    inside: jax.Array
    outside: jax.Array
    share_inside: jax.Array
    share_outside: jax.Array

    def edge(self) -> jax.Array:
        """How much each cell says about the edge, (b, h/4, w/4, 1): 1 where it is half inside and half outside."""
        return 4 * self.share_inside * self.share_outside


class ToneField(nnx.Module):
    """What to add to a decoded picture under the mask."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.channels = channels
        inputs = 3 * channels + 2
        first, *others = WIDTHS
        lowest, *back = reversed(others)

        def conv(inputs: int, outputs: int, stride: int = 1, *, zero: bool = False) -> Conv:
            init = nnx.initializers.zeros if zero else nnx.initializers.he_normal()
            return Conv(
                inputs, outputs, 3, stride=stride, padding=(1, 1), kernel_init=init, dtype=jnp.float32, rngs=rngs
            )

        self.find = nnx.List([conv(inputs, FINDER), conv(FINDER, FINDER), conv(FINDER, 1, zero=True)])
        self.enter = conv(inputs + 2 * channels + 1, first)
        self.down = nnx.List([conv(a, b, 2) for a, b in zip(WIDTHS[:-1], others, strict=True)])
        self.down_more = nnx.List([conv(b, b) for b in others])
        self.up = nnx.List([conv(a + b, b) for a, b in zip((lowest, *back), back, strict=False)])
        self.up_more = nnx.List([conv(b, b) for b in back])
        self.leave = conv(back[-1], channels + 2, zero=True)

    def __call__(self, picture: jax.Array, image: jax.Array, mask: jax.Array) -> jax.Array:
        """The picture with its tone set right under the mask.

        Args:
            picture: (b, h, w, c) in [-1, 1], decoded.
            image: the same shape; the picture whose pixels are kept. What it holds under the mask is not read.
            mask: (b, h, w, 1), 1 = generate, 0 = preserve.
        """
        picture, image, mask = (x.astype(jnp.float32) for x in (picture, image, mask))
        _, h, w, _ = picture.shape
        fields, weights = [], []
        for shift in SHIFTS:
            found = means(*(jnp.pad(x, beyond(shift)) for x in (picture, image, mask, 1 - mask)))
            fields.append(enlarge(self.field(found), 2 * CELL, (h + shift, w + shift))[:, shift:, shift:])
            weights.append(found.edge().sum((1, 2, 3), keepdims=True))
        return picture + mask * together(fields, weights)

    def field(self, found: Means) -> jax.Array:
        """The field, (b, ceil(h/8), ceil(w/8), c), from the means in the cells of one grid."""
        edge = found.edge()
        difference = found.outside - found.inside
        x = jnp.concatenate([*found, GAIN * difference * edge], -1)
        h = x
        for layer in self.find[:-1]:
            h = jax.nn.relu(layer(h))
        confidence = edge * jnp.exp(jnp.clip(self.find[-1](h), -6, 4))
        fitted, deviation = robust_fit(difference, confidence, found.share_inside)
        spread = push_pull(difference - fitted, confidence)
        deviation = jnp.broadcast_to(deviation, confidence.shape)
        h = jax.nn.relu(self.enter(jnp.concatenate([x, *(GAIN * part for part in (fitted, spread, deviation))], -1)))
        passed = []
        for down, more in zip(self.down, self.down_more, strict=True):
            h = jax.nn.relu(down(h))
            h = h + jax.nn.relu(more(h))
            passed.append(h)
        h = h + h.mean((1, 2), keepdims=True)
        for up, more, beside in zip(self.up, self.up_more, passed[-2::-1], strict=True):
            h = enlarge(h, 2, beside.shape[1:3])
            h = jax.nn.relu(up(jnp.concatenate([h, beside], -1)))
            h = h + jax.nn.relu(more(h))
        share_spread, share_fitted, rest = jnp.split(self.leave(h), [1, 2], -1)
        # Begins with all of the fit and nothing of what it leaves.
        return pool(fitted, 2) * (1 + share_fitted) + pool(spread, 2) * share_spread + OUTPUT * rest


def means(picture: jax.Array, image: jax.Array, mask: jax.Array, kept: jax.Array) -> Means:
    """What the field is predicted from.

    Arguments as for `ToneField`, of any size, and `kept`: 1 - mask, but 0 beyond the picture, as the mask is.
    """
    parts = [pool(x, CELL) for x in (mask * picture, kept * image, mask, kept)]
    inside, outside, share_inside, share_outside = parts
    return Means(inside / (share_inside + EPSILON), outside / (share_outside + EPSILON), share_inside, share_outside)


def beyond(shift: int) -> tuple[tuple[int, int], ...]:
    """What to pad (b, h, w, c) with so that a grid begins `shift` px above and left of it."""
    return ((0, 0), (shift, 0), (shift, 0), (0, 0))


def together(fields: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
    """The mean of several grids' fields, (b, h, w, c), by what their cells say, (b, 1, 1, 1); 0 without an edge."""
    total = sum((w * f for w, f in zip(weights, fields, strict=True)), jnp.zeros(()))
    return total / (sum(weights, jnp.zeros(())) + EPSILON)


def robust_fit(values: jax.Array, confidence: jax.Array, region: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A constant and a slope fitted to values, of which some are outliers.

    Args:
        values: (b, h, w, c).
        confidence: (b, h, w, 1), their weights; 0 where there is no value.
        region: (b, h, w, 1), zero or more; the slope's coordinates are 0 at its middle and of unit variance over it.

    Returns:
        (b, h, w, c), the fit at every place, and (b, 1, 1, 1), the values' deviation from it.
    """
    b, h, w, c = values.shape
    places = jnp.stack(jnp.meshgrid(jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32), indexing="ij"))
    coordinates = jnp.broadcast_to(places.reshape(2, h * w).T, (b, h * w, 2))
    share = region.reshape(b, h * w, 1) / (region.sum((1, 2, 3))[:, None, None] + EPSILON)
    middle = (share * coordinates).sum(1, keepdims=True)
    size = jnp.sqrt((share * jnp.square(coordinates - middle)).sum(1, keepdims=True) + 1)
    terms = jnp.concatenate([jnp.ones((b, h * w, 1)), (coordinates - middle) / size], -1)
    flat, weight = values.reshape(b, h * w, c), confidence.reshape(b, h * w, 1)
    prior = jnp.diag(jnp.asarray(PRIOR))[None]
    doubt = jnp.ones_like(weight)
    for _ in range(ROUNDS):
        weighted = terms * weight * doubt
        inner = jnp.einsum("bni,bnj->bij", weighted, terms) + prior
        coefficients = jnp.linalg.solve(inner, jnp.einsum("bni,bnc->bic", weighted, flat))
        fitted = jnp.einsum("bni,bic->bnc", terms, coefficients)
        squares = jnp.square(flat - fitted).sum(-1, keepdims=True)
        total = c * weight.sum(1, keepdims=True) + EPSILON
        variance = (weight * doubt * squares).sum(1, keepdims=True) / total + LEAST**2
        doubt = (FREEDOM + c) / (FREEDOM + squares / variance)
    return fitted.reshape(values.shape), jnp.sqrt(variance)[..., None]


def push_pull(values: jax.Array, confidence: jax.Array) -> jax.Array:
    """Spreads values to where there is no confidence in them: (b, h, w, c) and (b, h, w, 1) -> (b, h, w, c)."""
    levels = [(values * confidence, confidence)]
    while max(levels[-1][1].shape[1:3]) > 1:
        # Sums, not means: a larger cell that holds more of the edge is trusted more.
        levels.append((4 * pool(levels[-1][0], 2), 4 * pool(levels[-1][1], 2)))
    total, weight = levels[-1]
    result = total / (weight + EPSILON)
    for total, weight in levels[-2::-1]:
        # One division: no quotient of two small numbers, whose gradients would be large.
        result = (total + TRUST * enlarge(result, 2, total.shape[1:3])) / (weight + TRUST)
    return result


def pool(x: jax.Array, side: int) -> jax.Array:
    """Means over cells of `side` px, (b, h, w, c) -> (b, ceil(h / side), ceil(w / side), c); beyond the border is 0."""
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -h % side), (0, -w % side), (0, 0)))
    means: jax.Array = x.reshape(b, x.shape[1] // side, side, x.shape[2] // side, side, c).mean((2, 4))
    return means


def enlarge(x: jax.Array, factor: int, size: tuple[int, ...]) -> jax.Array:
    """Linear interpolation by `factor`, cut to `size`: (b, h, w, c) -> (b, *size, c)."""
    b, h, w, c = x.shape
    enlarged: jax.Array = jax.image.resize(x, (b, h * factor, w * factor, c), "linear")
    return enlarged[:, : size[0], : size[1]]
