"""A condition branch fitted to the decoder: least squares, which a model of known answer confirms."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import TINY

from asymvq_jax.config import Config, DataConfig, LossConfig, OptimizerConfig, RunConfig
from asymvq_jax.models.parameters import merge
from asymvq_jax.training.fitting import fit_condition, solve, sum_trees
from asymvq_jax.training.state import draw, init_state, make_blueprint

SIZE = 32


def _batches():
    rng = np.random.default_rng(0)
    while True:
        small = rng.uniform(0, 255, (2, 4, 4, 3)).astype(np.float32)
        image = np.asarray(jax.image.resize(small, (2, SIZE, SIZE, 3), "cubic")).clip(0, 255).astype(np.uint8)
        mask = np.zeros((2, SIZE, SIZE, 1), np.uint8)
        mask[:, 8:24, 8:24] = 1
        yield {"image": image, "mask": mask}


def test_sums_over_batches_give_numpys_least_squares():
    rng = np.random.default_rng(1)
    parts, inputs, targets = [], [], []
    for _ in range(3):
        x = np.concatenate([rng.normal(size=(50, 4)), np.ones((50, 1))], 1)
        y = x @ np.arange(10).reshape(5, 2) + rng.normal(size=(50, 2))
        parts.append((x.T @ x, x.T @ y, np.square(y).sum(0), y.sum(0)))
        inputs.append(x)
        targets.append(y)
    weights, left = solve(*sum_trees(parts))
    x, y = np.concatenate(inputs), np.concatenate(targets)
    wanted, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(weights, wanted, atol=2e-3)
    np.testing.assert_allclose(left, residual.sum() / (np.square(y - y.mean(0)).sum()), rtol=1e-2)


def test_without_kept_pixels_the_branch_is_zero():
    weights, left = solve(np.zeros((3, 3)), np.zeros((3, 2)), np.zeros(2), np.zeros(2))
    assert not weights.any()
    assert left == 1.0


def test_the_fitted_branch_is_nearer_to_the_decoder_than_its_mean_and_a_random_branch():
    config = Config(
        model=TINY,
        loss=LossConfig(gan_start=-1, perceptual_weight=0.0, discriminator_features=8),
        data=DataConfig(batch_size=2, image_size=SIZE),
        optimizer=OptimizerConfig(base_learning_rate=1e-4),
        run=RunConfig(init_from="somewhere", fit_condition=4),
    )
    blueprint = make_blueprint(config)
    state = init_state(blueprint, draw(blueprint.config))
    batch = next(_batches())
    fitted = fit_condition(blueprint, state, lambda: batch, config.run.fit_condition)
    params = {**state.frozen, **state.params}
    assert {name: x.shape for name, x in fitted.items()} == {
        name: x.shape for name, x in params.items() if name.startswith("decoder.condition.")
    }

    image, mask = batch["image"] / np.float32(127.5) - 1, batch["mask"].astype(np.float32)

    def disagreement(params):
        """Of the branch with the decoder over the kept pixels, as a share of the decoder's variance."""
        model = merge(blueprint.autoencoder, params)
        z = model.post_quant_conv(model.encode(image).mode())
        shares = []
        for mine, wanted in zip(
            model.decoder.condition((1 - mask) * image), model.decoder.unconditioned(z), strict=True
        ):
            kept = 1 - mask[:, :: SIZE // mine.shape[1], :: SIZE // mine.shape[1]]
            centred = wanted - (kept * wanted).sum((0, 1, 2), keepdims=True) / kept.sum()
            shares.append(float((kept * jnp.square(mine - wanted)).sum() / (kept * jnp.square(centred)).sum()))
        return np.array(shares)

    # Every layer has a bias, so least squares explain some of the variance where they are fitted.
    after = disagreement({**params, **fitted})
    assert (after < 1).all()
    assert (after < disagreement(params)).all()
