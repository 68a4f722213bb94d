"""Where the arithmetic of a training step goes, beside the least that its losses need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from asymvq_jax.config import Config
from asymvq_jax.devices.flops import matmul_flops, needed, scoped_flops
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.discriminator import Discriminator
from asymvq_jax.models.parameters import merge, seeded, split

# The named scopes of the step, the innermost first, and what stands in each.
_SCOPES = {
    "condition": "condition branch",
    "encoder": "encoder",
    "decoder": "decoder",
    "lpips_original": "LPIPS of the original",
    "lpips_reconstruction": "LPIPS of the reconstruction",
    "discriminator": "discriminator",
    "last_layer": "adaptive weight",
}
_FORWARD, _BACKWARD, _AGAIN = "decoder, forward", "decoder, backward", "recomputed"


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of a step on one chip: what the step does, and the least that it needs."""

    name: str
    flops: float
    least: float


def step_parts(config: Config, jaxpr: Any, chips: int) -> tuple[Part, ...]:
    """Divides a step's arithmetic.

    Args:
        config: the run.
        jaxpr: the step's, of all chips.
        chips: how many share it.

    Returns:
        The parts in the order in which they run. What a part needs at least follows from one forward pass: as much
        again for the gradient at the input of every layer behind the first trained one, and for that of every trained
        kernel. What stands in no part is "other".
    """
    found: defaultdict[str, float] = defaultdict(float)
    for scope, flops in scoped_flops(needed(jaxpr)).items():
        found[_part(scope)] += flops
    least = _least(config)
    names = [name for name in (*least, "other") if found[name] or least.get(name)]
    return tuple(Part(name, found[name] / chips, least.get(name, found[name]) / chips) for name in names)


def _part(scope: str) -> str:
    name = next((part for key, part in _SCOPES.items() if key in scope), "other")
    if "rematted_computation" in scope:
        return _AGAIN
    if name == "decoder":
        return _BACKWARD if "transpose(" in scope else _FORWARD
    return name


def _least(config: Config) -> dict[str, float]:
    """FLOPs that each part needs at least, over all chips."""
    model, data, loss = config.model, config.data, config.loss
    graphdef, params = structure(model)
    side, factor = data.image_size, model.downsampling

    def maps(side: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((data.batch_size, side, side, channels), jnp.float32)

    def flops(graphdef: Any, params: Any, run: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> float:
        jaxpr = jax.make_jaxpr(lambda params, *inputs: run(merge(graphdef, params), *inputs))(params, *inputs)
        return matmul_flops(needed(jaxpr.jaxpr))

    image, mask, z = maps(side, model.image_channels), maps(side, 1), maps(side // factor, model.latent_channels)
    encode = flops(graphdef, params, lambda m, x: m.encode(x).mode(), image)
    if config.run.train_encoder:
        encode += 2 * flops(graphdef, params, lambda m, x: m.encoder(x), image)
        encode -= flops(graphdef, params, lambda m, x: m.encoder.conv_in(x), image)
    inputs = (z, image, mask) if model.condition else (z, None, None)
    decode = flops(graphdef, params, lambda m, *x: m.decode_features(*x), *inputs)
    branch = first = 0.0
    if model.condition:
        branch = flops(graphdef, params, lambda m, x: m.decoder.condition(x), image)
        first = flops(graphdef, params, lambda m, x: m.decoder.condition.layers[0](x), image)
    last = flops(graphdef, params, lambda m, x: m.decoder.to_image(x), maps(side, model.decoder_channels[0]))
    forward = decode - branch + last
    into = 0.0
    if not config.run.train_encoder:
        # No gradient reaches the latent, nor the frozen convolution behind it.
        into = flops(graphdef, params, lambda m, z: m.decoder.conv_in(z), z)
        into += 2 * flops(graphdef, params, lambda m, z: m.post_quant_conv(z), z) if model.quant_conv else 0.0
    result = {
        "encoder": encode,
        _FORWARD: forward,
        _BACKWARD: 2 * forward - into,
        "condition branch": 3 * branch - first,
        _AGAIN: 0.0,
    }
    if loss.perceptual_weight:
        lpips, weights = split(nnx.eval_shape(lambda: LPIPS("vgg16", rngs=seeded(0))))
        features = flops(lpips, weights, lambda m, x: m.features(x), image)
        both = flops(lpips, weights, lambda m, x: m(x, x), image)
        result |= {"LPIPS of the original": features, "LPIPS of the reconstruction": 2 * (both - features)}
    if loss.gan_start >= 0:
        judge, weights = split(nnx.eval_shape(lambda: Discriminator(loss, model, rngs=seeded(0))))
        logits = flops(judge, weights, lambda m, x: m(x), image)
        first = flops(judge, weights, lambda m, x: m.convs[0](x), image)
        # Both pictures forward; back to the reconstruction for the generator; both pictures' kernels for itself.
        result["discriminator"] = 7 * logits - 2 * first
        # The last kernel's gradient by both losses; their sum is what the decoder's backward pass needs of it.
        result["adaptive weight"] = 2 * last
        result[_BACKWARD] -= last
    return result
