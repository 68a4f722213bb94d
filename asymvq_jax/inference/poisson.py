"""Poisson image editing (Pérez et al. 2003): a fill's gradients, with the colours that surround it.

The unknowns are the pixels under the mask. On every edge between two of them the result has the fill's difference; on
an edge that crosses the mask's border the guidance is zero, and the kept pixel's colour is the boundary value; the
picture's own border leaves the gradient free. Written for the correction d = result - fill that is

    sum over q in the mask of (d_p - d_q)  +  sum over kept q of (d_p - (original_q - fill_p))  =  0    for every p,

with q the four neighbours of p: a symmetric system, positive definite on every piece of the mask that touches a kept
pixel, and d = 0 on one that does not. Nothing of the original under the mask occurs in it.

It is solved by conjugate gradients. The preconditioner is one multigrid cycle: cells of 2 x 2 pixels are merged, level
by level, so that every level is again a graph of four neighbours, for a mask of any shape.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The cycle's estimate of the error, in levels of 0 to 255, at which the iteration ends; and when it ends at the latest.
TOLERANCE = 0.02
ITERATIONS = 300
# Sides at which merging ends, cells, and the sweeps of the coarsest graph.
COARSEST, SWEEPS = 8, 40
DAMPING = 0.8


class _Level(NamedTuple):
    """A graph of cells, arrays (b, 1, h, w): its edges' weights, and the sum of all, with those to kept pixels."""

    right: jax.Array
    left: jax.Array
    below: jax.Array
    above: jax.Array
    total: jax.Array
    # The share of a residual that a damped Jacobi step moves a pixel by; 0 outside the graph.
    share: jax.Array


@jax.jit
def poisson(fill: jax.Array, original: jax.Array, mask: jax.Array) -> jax.Array:
    """The fill under the mask with its tone moved so that it meets the kept pixels, which stay as they are.

    Args:
        fill: (b, h, w, c) float in [0, 255].
        original: the same shape; its pixels under the mask are not read.
        mask: (b, h, w, 1), 1 = generate, 0 = preserve; any shape, also full, empty or at the picture's border. A pixel
            counts as masked where it is above 0.

    Returns:
        (b, h, w, c) float32, not clipped: within a quarter of a level of the exact solution.
    """
    inside = mask.astype(jnp.float32) > 0
    # What is under the mask may be anything, also not finite.
    kept = jnp.where(inside, 0.0, original.astype(jnp.float32))
    filled = fill.astype(jnp.float32)
    height, width = mask.shape[1:3]
    depth = max(0, (max(height, width) - 1).bit_length() - COARSEST.bit_length() + 1)
    extra = ((0, 0), (0, 0), (0, -height % 2**depth), (0, -width % 2**depth))

    def planes(x: jax.Array) -> jax.Array:
        """(b, c, h, w), rows and columns last for speed, filled up with zeros to what can be halved `depth` times."""
        return jnp.pad(x.transpose(0, 3, 1, 2), extra)

    region, outside = planes(inside.astype(jnp.float32)), planes((~inside).astype(jnp.float32))
    crossing = region * sum(_neighbours(outside))
    target = region * sum(_neighbours(planes(kept))) - crossing * planes(filled)
    right, _, below, _ = _neighbours(region)
    levels = [_level(region * right, region * below, crossing)]
    for _ in range(depth):
        levels.append(_coarser(levels[-1]))
    correction = _solve(levels, target)[:, :, :height, :width].transpose(0, 2, 3, 1)
    return jnp.where(inside, filled + correction, kept)


def _neighbours(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The values to the right, to the left, below and above; 0 beyond the border."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return padded[..., 1:-1, 2:], padded[..., 1:-1, :-2], padded[..., 2:, 1:-1], padded[..., :-2, 1:-1]


def _level(right: jax.Array, below: jax.Array, kept: jax.Array) -> _Level:
    left, above = _neighbours(right)[1], _neighbours(below)[3]
    total = right + left + below + above + kept
    return _Level(
        right, left, below, above, total, jnp.where(total > 0, DAMPING / jnp.where(total > 0, total, 1.0), 0.0)
    )


def _coarser(level: _Level) -> _Level:
    """The graph of cells of 2 x 2: weights add up.

    Functions that are constant on the cells make the sums twice too stiff in two dimensions, so they are halved.
    """
    right = 0.5 * _merge(level.right[..., 1::2], rows=True)
    below = 0.5 * _merge(level.below[..., 1::2, :], columns=True)
    kept = level.total - level.right - level.left - level.below - level.above
    return _level(right, below, 0.5 * _merge(kept, rows=True, columns=True))


def _merge(x: jax.Array, *, rows: bool = False, columns: bool = False) -> jax.Array:
    """Sums of neighbouring pairs along the axes named."""
    x = x[..., ::2, :] + x[..., 1::2, :] if rows else x
    return x[..., ::2] + x[..., 1::2] if columns else x


def _apply(level: _Level, x: jax.Array) -> jax.Array:
    right, left, below, above = _neighbours(x)
    return level.total * x - level.right * right - level.left * left - level.below * below - level.above * above


def _apart(x: jax.Array) -> jax.Array:
    """Keeps XLA from fusing what comes after with what came before, and computing a pixel for each neighbour anew."""
    y: jax.Array = jax.lax.optimization_barrier(x)
    return y


def _cycle(levels: list[_Level], b: jax.Array) -> jax.Array:
    """One V-cycle from 0 with a damped Jacobi step before and after: symmetric, as conjugate gradients ask for."""
    level, *coarser = levels
    x = level.share * b
    if not coarser:
        swept: jax.Array = jax.lax.fori_loop(1, SWEEPS, lambda _, x: x + level.share * (b - _apply(level, x)), x)
        return swept
    residual = _apart(_merge(b - _apply(level, x), rows=True, columns=True))
    correction = _cycle(coarser, residual).repeat(2, -1).repeat(2, -2)
    x = _apart(x + jnp.where(level.total > 0, correction, 0.0))
    return x + level.share * (b - _apply(level, x))


def _solve(levels: list[_Level], b: jax.Array) -> jax.Array:
    """Preconditioned conjugate gradients, for every picture and channel with step lengths of its own."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=(2, 3), keepdims=True)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    def unfinished(state: _Iterate) -> jax.Array:
        return (state.step < ITERATIONS) & (state.error > TOLERANCE)

    def advance(state: _Iterate) -> _Iterate:
        z = _cycle(levels, state.residual)
        product = dot(state.residual, z)
        direction = z + ratio(product, state.product) * state.direction
        q = _apart(_apply(levels[0], direction))
        length = ratio(product, dot(direction, q))
        x, residual = state.x + length * direction, state.residual - length * q
        return _Iterate(state.step + 1, x, residual, direction, product, jnp.max(jnp.abs(z)))

    nothing = jnp.zeros_like(b)
    begin = _Iterate(jnp.zeros((), jnp.int32), nothing, b, nothing, jnp.zeros_like(dot(b, b)), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, advance, begin).x


class _Iterate(NamedTuple):
    step: jax.Array
    x: jax.Array
    residual: jax.Array
    direction: jax.Array
    # Of residual and preconditioned residual, (b, c, 1, 1).
    product: jax.Array
    # The cycle's estimate of the error before the last step.
    error: jax.Array
