"""One training step against the reference's published formulas in torch, and against itself on eight devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import VQModel
from flax import nnx
from oracles import TINY, TorchLPIPS, TorchPatchGAN, asymmetric, nchw, numpy_state, perturb_norms
from torch.nn import functional as F

from asymvq_jax.config import Config, DataConfig, HarmoniseConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig
from asymvq_jax.convert.mapping import from_torch, model_from_tensors, weights
from asymvq_jax.devices import sharding
from asymvq_jax.errors import ConfigError
from asymvq_jax.losses.lpips import load_lpips
from asymvq_jax.models.parameters import seeded, split
from asymvq_jax.training import state as states
from asymvq_jax.training import step
from asymvq_jax.training.optimizer import (
    autoencoder_optimizer,
    autoencoder_schedule,
    discriminator_optimizer,
    discriminator_schedule,
    learning_rate,
)
from asymvq_jax.training.state import create_state, make_blueprint, starting_parameters
from asymvq_jax.training.step import _gradients, _penalty_weights, compiled_step, eval_step, train_step

SIZE = 32
# Two levels compile in half the time of four, and are sharded alike.
SMALL = dataclasses.replace(TINY, encoder_channels=(32, 32), decoder_channels=(64, 64))

pytestmark = pytest.mark.usefixtures("standard_promotion")


def _config(**changes) -> Config:
    parts = {
        "model": TINY,
        "loss": LossConfig(gan_start=0, discriminator_features=16),
        "data": DataConfig(batch_size=2, image_size=SIZE),
        "optimizer": OptimizerConfig(base_learning_rate=1e-4, warmup_steps=0, pretrained_scale=0.5),
        # A seed with no pixel within rounding of a kink of |x| or ReLU, where a gradient jumps.
        "run": RunConfig(init_from="somewhere", steps=100, seed=2),
    }
    return Config(**(parts | changes))


def _batch(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    # Smooth pictures: on noise the discriminator's activations differ little from picture to picture.
    small = rng.uniform(0, 255, (count, 4, 4, 3)).astype(np.float32)
    image = np.asarray(jax.image.resize(small, (count, SIZE, SIZE, 3), "cubic")).clip(0, 255).astype(np.uint8)
    mask = np.repeat(np.repeat(rng.integers(0, 2, (count, 4, 4, 1)), 8, 1), 8, 2).astype(np.uint8)
    return {"image": image, "mask": mask}


def _one_device(config: Config):
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


def _perceptual():
    return split(load_lpips("vgg16"))[1]


class TorchStep:
    """The reference's training step with one forward pass: losses, adaptive weight, gradients, batch statistics."""

    def __init__(self, config: Config, batch, noise: np.ndarray, discriminator, perceptual) -> None:
        self.model = asymmetric(config.model)
        self.gan = TorchPatchGAN(config.loss.discriminator_features).load(discriminator).train()
        image, mask = nchw(batch["image"] / np.float32(127.5) - 1), nchw(batch["mask"])
        with torch.no_grad():
            posterior = self.model.encode(image).latent_dist
            z = posterior.mean + posterior.std * nchw(noise)
            z = self.model.post_quant_conv(z)
        recon = self.model.decoder(z, image, mask)
        distance = TorchLPIPS(perceptual)(recon, image)
        self.nll = ((recon - image).abs() + distance).sum() / len(image)
        self.generator = -self.gan(recon).mean()
        last = self.model.decoder.conv_out.weight
        at_nll, at_gan = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (self.nll, self.generator))
        self.weight = config.loss.gan_weight * (at_nll.norm() / (at_gan.norm() + 1e-4)).clamp(0, 1e4)
        (self.nll + self.weight * self.generator).backward()
        self.gan.zero_grad()
        real, fake = self.gan(image), self.gan(recon.detach())
        self.discriminator = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.discriminator.backward()


def _close(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    """Each array within `tolerance` of its counterpart's norm, and all of them together.

    A bias before a normalisation has no gradient but rounding noise; it is held to the norm of all gradients.
    """
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        difference = np.linalg.norm(np.asarray(ours[name]) - value)
        assert difference <= tolerance * np.linalg.norm(value) + _noise(theirs), name


def _noise(gradients: dict) -> float:
    """The size of rounding errors beside all of `gradients`."""
    return 1e-6 * float(np.sqrt(sum(np.sum(np.square(value)) for value in gradients.values())))


def test_step_equals_torch(monkeypatch):
    config, batch = _config(), _batch(2)
    blueprint = make_blueprint(config)
    theirs = asymmetric(config.model)
    model = model_from_tensors(config.model, numpy_state(theirs), "diffusers")
    mesh = _one_device(config)
    state = create_state(blueprint, mesh, split(model)[1])
    perceptual = _perceptual()
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    noise = jax.random.normal(key, (2, SIZE // 8, SIZE // 8, 4))
    torch_step = TorchStep(config, batch, noise, {**state.discriminator, **state.batch_stats}, perceptual)

    # One program, which returns the gradients that the step takes as well.
    taken = []

    def strict(*args, **keywords):
        with jax.numpy_dtype_promotion("strict"):
            taken.append(_gradients(*args, **keywords))
        return taken[0]

    monkeypatch.setattr(step, "_gradients", strict)
    whole = jax.jit(lambda *args: (train_step(*args, blueprint=blueprint, adversarial=True)[0], taken.pop()))
    after, (grads, stats, metrics) = whole(state, perceptual, batch)
    expected = {
        "nll": torch_step.nll,
        "generator": torch_step.generator,
        "adaptive_weight": torch_step.weight,
        "discriminator": torch_step.discriminator,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value.detach().numpy(), rtol=1e-4, err_msg=name)
    named = dict(torch_step.model.named_parameters())
    decoder = {
        w.path: from_torch(w, named[w.name].grad.numpy())
        for w in weights(config.model, "diffusers")
        if w.path.startswith("decoder.")
    }
    _close(grads.params, decoder)
    gan = torch_step.gan
    _close(grads.discriminator, gan.as_ours({n: p.grad for n, p in gan.named_parameters()}))
    _close(stats, gan.as_ours({n: b for n, b in gan.named_buffers() if "num_batches" not in n}))

    # The whole step: Adam of the same gradients, at the two groups' rates. Its first step moves each weight by the
    # rate, whatever its gradient's size: where that is rounding noise, so is the sign, and it is left out.
    peak = config.optimizer.base_learning_rate * config.data.batch_size
    compared = 0
    for name, gradient in decoder.items():
        rate = peak if name.startswith("decoder.condition.") else peak / 2
        parameter = torch.nn.Parameter(torch.from_numpy(np.array(state.params[name])))
        parameter.grad = torch.from_numpy(np.array(gradient))
        torch.optim.Adam([parameter], lr=rate, betas=(0.5, 0.9)).step()
        certain = np.abs(gradient) > _noise(decoder)
        difference = np.abs(np.asarray(after.params[name]) - parameter.detach().numpy())[certain]
        assert np.all(difference <= 1e-2 * rate), name
        compared += certain.sum()
    assert compared > 0.9 * sum(gradient.size for gradient in decoder.values())
    # The discriminator's own Adam, whose schedule begins when it does.
    for name, gradient in grads.discriminator.items():
        parameter = torch.nn.Parameter(torch.from_numpy(np.array(state.discriminator[name])))
        parameter.grad = torch.from_numpy(np.array(gradient))
        torch.optim.Adam([parameter], lr=peak, betas=(0.5, 0.9)).step()
        difference = np.abs(np.asarray(after.discriminator[name]) - parameter.detach().numpy())
        assert np.all(difference[np.abs(gradient) > _noise(grads.discriminator)] <= 1e-2 * peak), name
    assert after.step == 1
    assert not set(after.frozen) & set(after.params)


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    blueprint = make_blueprint(_config())
    state = jax.eval_shape(lambda: states.init_state(blueprint, states.draw(blueprint.config)))
    assert all(not name.startswith("decoder.") for name in state.frozen)
    assert {"encoder.conv_in.kernel", "quant_conv.kernel", "post_quant_conv.kernel"} <= set(state.frozen)
    adam = state.optimizer[0]
    assert set(adam.mu) == set(adam.nu) == set(state.params)


def test_first_stage_trains_everything_with_the_kl_term():
    config = _config(
        model=dataclasses.replace(SMALL, condition=False),
        run=RunConfig(train_encoder=True, steps=10),
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, kl_weight=0.5, discriminator_features=16),
    )
    blueprint = make_blueprint(config)
    state = create_state(blueprint, _one_device(config))
    assert not state.frozen
    after, metrics = jax.jit(partial(train_step, blueprint=blueprint, adversarial=False))(state, {}, _batch(2))
    assert not np.array_equal(after.params["encoder.conv_in.kernel"], state.params["encoder.conv_in.kernel"])
    np.testing.assert_allclose(metrics["loss"], metrics["nll"] + 0.5 * metrics["kl"], rtol=1e-6)
    np.testing.assert_array_equal(after.discriminator["conv_out.kernel"], state.discriminator["conv_out.kernel"])


VQ = dataclasses.replace(
    TINY,
    latent_channels=3,
    encoder_channels=(32, 32, 64),
    decoder_channels=(32, 32, 64),
    attention_levels=(2,),
    codebook_size=24,
    condition=False,
)


def _vq_model() -> VQModel:
    """diffusers' model of these sizes with random weights, and codes of the latents' spread."""
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=VQ.encoder_channels,
        layers_per_block=VQ.encoder_blocks,
        latent_channels=VQ.latent_channels,
        num_vq_embeddings=VQ.codebook_size,
    )
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return perturb_norms(model)


def _vq_config(**changes) -> Config:
    """VQGAN's loss, with means."""
    loss = LossConfig(reduction="mean", gan_start=0, discriminator_features=16, perceptual_weight=0.0)
    return _config(model=VQ, loss=loss, run=RunConfig(train_encoder=True, steps=100, seed=2), **changes)


def test_vq_first_stage_step_equals_torch():
    """The codebook's, the encoder's and the decoder's gradients, with diffusers' quantiser and its weights (legacy)."""
    config, batch = _vq_config(), _batch(2)
    blueprint = make_blueprint(config)
    theirs = _vq_model()
    state = create_state(
        blueprint, _one_device(config), split(model_from_tensors(VQ, numpy_state(theirs), "diffusers"))[1]
    )
    assert not state.frozen
    gan = TorchPatchGAN(16).load({**state.discriminator, **state.batch_stats}).train()
    image = nchw(batch["image"] / np.float32(127.5) - 1)
    quantized, penalty, (_, _, codes) = theirs.quantize(theirs.encode(image).latents)
    recon = theirs.decoder(theirs.post_quant_conv(quantized))
    nll, generator = (recon - image).abs().mean(), -gan(recon).mean()
    last = theirs.decoder.conv_out.weight
    at_nll, at_gan = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, generator))
    weight = config.loss.gan_weight * (at_nll.norm() / (at_gan.norm() + 1e-4)).clamp(0, 1e4)
    (nll + penalty + weight * generator).backward()

    gradients = jax.jit(partial(_gradients, blueprint, adversarial=True))
    pixels, mask = jnp.asarray(batch["image"] / np.float32(127.5) - 1), jnp.asarray(batch["mask"], jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        grads, _, metrics = gradients(state, {}, state.batch_stats, pixels, mask, jax.random.key(0))
    expected = {"nll": nll, "adaptive_weight": weight, "loss": nll + penalty + weight * generator}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value.detach().numpy(), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(1.25 * metrics["commitment"], penalty.detach().numpy(), rtol=1e-4)
    counts = np.bincount(codes.numpy().ravel(), minlength=VQ.codebook_size)
    assert (counts > 0).sum() > 3
    np.testing.assert_allclose(metrics["code_shares"], counts / counts.sum(), rtol=1e-6)
    named = dict(theirs.named_parameters())
    _close(grads.params, {w.path: from_torch(w, named[w.name].grad.numpy()) for w in weights(VQ, "diffusers")})


def test_the_latents_penalties_keep_their_balance_with_the_reconstruction():
    config = _vq_config()
    as_sum = dataclasses.replace(config, loss=dataclasses.replace(config.loss, reduction="sum"))
    assert _penalty_weights(config, 1000) == pytest.approx({"kl": 1e-9, "codebook": 0.25, "commitment": 1.0})
    assert _penalty_weights(as_sum, 1000) == pytest.approx({"kl": 1e-6, "codebook": 250, "commitment": 1000})
    assert set(_penalty_weights(_config(), 1000).values()) == {0.0}


def test_accumulated_gradients_equal_the_whole_batch():
    """Without the GAN, whose batch statistics are a micro-batch's, the sum over micro-batches is the batch's."""
    results = []
    for accumulate in (1, 4):
        config = _config(
            model=SMALL,
            loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=16),
            data=DataConfig(batch_size=4, image_size=SIZE),
            optimizer=OptimizerConfig(accumulate=accumulate, ema_decay=0.9),
        )
        blueprint = make_blueprint(config)
        state = create_state(blueprint, _one_device(config))
        # A posterior without spread, because each micro-batch draws its own noise.
        state.frozen["quant_conv.bias"] = state.frozen["quant_conv.bias"].at[4:].set(-60.0)
        one_step = jax.jit(partial(train_step, blueprint=blueprint, adversarial=False))
        results.append((state, *one_step(state, {}, _batch(4))))
    (before, one, metrics), (_, four, other) = results
    np.testing.assert_allclose(metrics["nll"], other["nll"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], other["grad_norm"], rtol=1e-4)
    name = "decoder.conv_in.kernel"
    np.testing.assert_allclose(one.ema[name], 0.9 * before.ema[name] + 0.1 * one.params[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.params[name], four.params[name], rtol=1e-3, atol=1e-6)


MESH_RATE = 1e-5
MESHES = [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.fixture(scope="module")
def one_device_result():
    with jax.numpy_dtype_promotion("standard"):
        return _two_steps(_mesh_config(MeshConfig(data=1)), jax.devices()[:1])


def _mesh_config(mesh: MeshConfig) -> Config:
    return _config(
        mesh=mesh,
        model=SMALL,
        data=DataConfig(batch_size=8, image_size=SIZE),
        harmonise=HarmoniseConfig(probability=0.5, composite=True, halo_weight=1.0),
        # Small steps: Adam turns a gradient that is rounding noise into a whole one, and the next metrics must agree.
        optimizer=OptimizerConfig(base_learning_rate=MESH_RATE / 8, warmup_steps=0),
    )


def _two_steps(config: Config, devices):
    mesh = sharding.make_mesh(config.mesh, devices)
    blueprint = make_blueprint(config)
    state = create_state(blueprint, mesh)
    perceptual = _perceptual()
    perceptual = jax.device_put(perceptual, sharding.state_sharding(perceptual, mesh))
    batch = jax.device_put(_batch(8), sharding.batch_sharding(mesh))
    history = []
    with jax.set_mesh(mesh):
        one_step = compiled_step(blueprint, state, mesh)
        for _ in range(2):
            state, metrics = one_step(state, perceptual, batch, adversarial=True)
            history.append(jax.device_get((metrics, state.optimizer[0].mu)))
    return state, history


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}-{m.fsdp}-{m.tensor}")
def test_sharded_steps_equal_one_device(mesh, one_device_result, monkeypatch):
    # The tiny model's kernels are far below the size at which they would be split.
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 32 * 1024)
    state, history = _two_steps(_mesh_config(mesh), jax.devices())
    expected_state, expected_history = one_device_result
    # After the first update a gradient that was rounding noise has moved its weight, and a pixel may cross a kink of
    # |x| or ReLU: the second step is held less tightly.
    for (metrics, moments), (expected, expected_moments), tolerance in zip(
        history, expected_history, (2e-4, 5e-3), strict=True
    ):
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)
        _close(moments, expected_moments, 5 * tolerance)
    for name, moment in expected_moments.items():
        # Adam moves each weight by about the rate, whatever its gradient's size: where that is rounding noise, so is
        # the sign, and it is left out.
        certain = np.abs(moment) > _noise(expected_moments)
        difference = np.abs(np.asarray(state.params[name]) - np.asarray(expected_state.params[name]))[certain]
        assert difference.sum() <= 0.05 * MESH_RATE * certain.sum(), name
    kernel = state.params["decoder.levels.1.blocks.1.conv1.kernel"]
    shape = kernel.sharding.shard_shape(kernel.shape)
    assert shape == (3, 3, 64 // mesh.fsdp, 64 // mesh.tensor)
    moment = state.optimizer[0].mu["decoder.levels.1.blocks.1.conv1.kernel"]
    assert moment.sharding == kernel.sharding
    assert state.params["decoder.conv_out.bias"].sharding.is_fully_replicated


def test_a_sharded_vq_step_equals_one_device(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_BYTES", 32 * 1024)
    initial = split(model_from_tensors(VQ, numpy_state(_vq_model()), "diffusers"))[1]
    results = []
    for sizes, accumulate, devices in (
        (MeshConfig(data=1), 1, jax.devices()[:1]),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2, jax.devices()),
    ):
        config = _vq_config(
            mesh=sizes,
            data=DataConfig(batch_size=8, image_size=SIZE),
            optimizer=OptimizerConfig(base_learning_rate=MESH_RATE / 8, warmup_steps=0, accumulate=accumulate),
        )
        # Without the GAN, whose batch statistics are a micro-batch's.
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, gan_start=-1))
        mesh = sharding.make_mesh(sizes, devices)
        blueprint = make_blueprint(config)
        state = create_state(blueprint, mesh, initial)
        batch = jax.device_put(_batch(8), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            state, metrics = compiled_step(blueprint, state, mesh)(state, {}, batch, adversarial=False)
        results.append((state, metrics))
    (one, expected), (eight, metrics) = results
    assert set(metrics) >= {"codebook", "commitment", "perplexity", "codes_used"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)
    _close(eight.optimizer[0].mu, jax.device_get(one.optimizer[0].mu), 1e-3)
    assert eight.params["codebook.embedding"].sharding.is_fully_replicated
    assert not eight.params["encoder.levels.2.blocks.0.conv1.kernel"].sharding.is_fully_replicated


def test_learning_rate_is_the_reference_schedule():
    """LambdaWarmUpCosineScheduler of the reference, written out."""
    peak, minimum, warmup, steps = 3.6e-4, 1e-6, 50, 1000
    schedule = learning_rate(peak, minimum, warmup, steps)
    for n in (0, 1, 25, 49, 50, 51, 500, 999, 1000, 2000):
        if n < warmup:
            expected = (peak - 0.01 * peak) / warmup * n + 0.01 * peak
        else:
            t = min((n - warmup) / (steps - warmup), 1.0)
            expected = minimum + 0.5 * (peak - minimum) * (1 + np.cos(t * np.pi))
        np.testing.assert_allclose(schedule(n), expected, rtol=1e-4)


def test_a_constant_schedule_stays_at_the_peak():
    config = _config(optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=10, schedule="constant"))
    schedule = autoencoder_schedule(config)
    np.testing.assert_allclose(
        [schedule(n) for n in (0, 5, 10, 99, 1000)], [2e-6, 1.01e-4, 2e-4, 2e-4, 2e-4], rtol=1e-5
    )


def test_the_discriminators_schedule_ends_with_the_run():
    loss = LossConfig(gan_start=90)
    config = _config(
        loss=loss, optimizer=OptimizerConfig(base_learning_rate=1e-4, warmup_steps=2, min_learning_rate=1e-6)
    )
    schedule = discriminator_schedule(config)
    # Ten of the hundred steps are left, of which two are the warm-up.
    np.testing.assert_allclose([schedule(n) for n in (0, 2, 6, 10)], [2e-6, 2e-4, 1.005e-4, 1e-6], rtol=1e-4)
    optimizer, params = discriminator_optimizer(config), {"kernel": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(11):
        # Adam turns a constant gradient into steps of the rate.
        updates, state = optimizer.update(params, state, params)
        sizes.append(-updates["kernel"])
    np.testing.assert_allclose(sizes, [schedule(n) for n in range(11)], rtol=1e-4)


def test_preservation_is_taken_over_the_preserved_pixels():
    config = _config(model=SMALL, loss=LossConfig(perceptual_weight=0.0, discriminator_features=16))
    blueprint = make_blueprint(config)
    state = create_state(blueprint, _one_device(config))
    batch = _batch(2)
    evaluate = jax.jit(partial(eval_step, blueprint=blueprint, pictures=2))
    metrics, recon = evaluate({**state.params, **state.frozen}, {}, batch)
    squares = np.square(np.asarray(recon) - (batch["image"] / np.float32(127.5) - 1)).mean(-1, keepdims=True)
    kept = squares[batch["mask"] == 0].mean()
    assert abs(kept - squares[batch["mask"] == 1].mean()) > 0.01 * kept
    np.testing.assert_allclose(metrics["preservation"], kept, rtol=1e-5)
    all_masked = {**batch, "mask": np.ones_like(batch["mask"])}
    assert evaluate({**state.params, **state.frozen}, {}, all_masked)[0]["preservation"] == 0


def test_pretrained_parameters_take_a_share_of_the_rate():
    params = {"decoder.conv_in.kernel": jnp.ones(3), "decoder.condition.layers.0.kernel": jnp.ones(3)}
    optimizer = autoencoder_optimizer(_config(optimizer=OptimizerConfig(pretrained_scale=0.1, warmup_steps=0)), params)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    ratio = updates["decoder.conv_in.kernel"] / updates["decoder.condition.layers.0.kernel"]
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-4)
    assert optax.tree.norm(updates) > 0


def test_starting_parameters_take_the_decoder_only_where_the_sizes_agree():
    _, params = split(nnx.eval_shape(lambda: states.Autoencoder(TINY, rngs=seeded(0))))
    same = starting_parameters(_config(), dataclasses.replace(TINY, condition=False), params)
    assert "decoder.conv_in.kernel" in same
    wider = _config(model=dataclasses.replace(TINY, decoder_blocks=3))
    assert not any(name.startswith("decoder.") for name in starting_parameters(wider, TINY, params))
    other = dataclasses.replace(TINY, latent_channels=16)
    with pytest.raises(ConfigError, match=r"another encoder: model\.latent_channels=4 \(there 16\)"):
        starting_parameters(_config(), other, params)
    for field in ("scaling_factor", "shift_factor"):
        with pytest.raises(ConfigError, match=rf"another encoder: model\.{field}="):
            starting_parameters(_config(), dataclasses.replace(TINY, **{field: 0.5}), params)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), "does not fit 8 device.*set --mesh.data=-1 to let the data axis take"),
        (MeshConfig(data=-1, fsdp=3), "does not fit 8 device.*choose mesh.fsdp so that the product divides 8"),
        (
            MeshConfig(data=2, fsdp=2, tensor=3),
            "choose mesh.data x mesh.fsdp x mesh.tensor so that the product divides",
        ),
    ],
)
def test_mesh_that_does_not_fit(mesh, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(mesh)


def test_batch_that_does_not_split():
    with pytest.raises(ConfigError, match=r"data.batch_size=12: expected a multiple of 16"):
        sharding.check_batch(12, 2, sharding.make_mesh(MeshConfig(data=8)))
