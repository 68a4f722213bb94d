"""Plans: what is read from compiled programs, and that sharding lowers it as it should; on eight virtual devices."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asymvq_jax.commands import plan as command
from asymvq_jax.commands import plan_denoising as plan_denoising_command
from asymvq_jax.commands import plan_table
from asymvq_jax.config import Config, DataConfig, LossConfig, MeshConfig, ModelConfig, RunConfig
from asymvq_jax.devices import sharding
from asymvq_jax.devices.flops import matmul_flops
from asymvq_jax.diffusion import layers
from asymvq_jax.diffusion.unet import UNet, UNetConfig
from asymvq_jax.diffusion.unet import read_config as read_unet_config
from asymvq_jax.errors import ConfigError, InputError
from asymvq_jax.losses.lpips import LPIPS
from asymvq_jax.models.autoencoder import structure
from asymvq_jax.models.parameters import merge, seeded, split
from asymvq_jax.plan import advice, chips
from asymvq_jax.plan import compile as compiling
from asymvq_jax.plan.chips import CHIPS, GIB, Target, by_sides, largest_fit, open_topology, roofline
from asymvq_jax.plan.compile import (
    Memory,
    Program,
    no_jax_cache,
    out_of_memory,
    plan_decode,
    plan_denoising,
    plan_picture,
    plan_step,
)  # fmt: skip
from asymvq_jax.plan.counting import BETWEEN_SLICES, Collective, collectives
from asymvq_jax.plan.parts import step_parts

SMALL = ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 64), encoder_blocks=1, decoder_blocks=1)
BATCH = 8

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # The tiny model's kernels are far below the size at which they would be split.
        patch.setattr(sharding, "MIN_SHARDED_BYTES", 1)
        yield


def _config(**changes) -> Config:
    parts = {
        "model": SMALL,
        "loss": LossConfig(perceptual_weight=0.0, gan_start=0, discriminator_features=16, discriminator_layers=2),
        "data": DataConfig(batch_size=BATCH, image_size=32),
        "run": RunConfig(init_from="somewhere"),
    }
    return Config(**(parts | changes))


@pytest.fixture(scope="module")
def plans(_own_cache):
    """The step of one global batch on eight devices by data, and on four by fsdp."""
    meshes = {"data": MeshConfig(data=8), "fsdp": MeshConfig(data=1, fsdp=4)}
    with jax.numpy_dtype_promotion("standard"):
        return {
            name: plan_step(_config(mesh=mesh), Target("local", jax.devices()[: mesh.data * mesh.fsdp], None, "x"))
            for name, mesh in meshes.items()
        }


def test_data_parallelism_sums_each_gradient_once(plans):
    """Nothing but sums: of the gradients, and of little else (batch statistics, metrics)."""
    (sums,) = plans["data"].collectives
    assert (sums.kind, sums.axes) == ("all-reduce", ("data",))
    # Adam keeps two arrays for each gradient. The discriminator's are summed twice, for both kinds of picture.
    gradients = plans["data"].memory.optimizer / 2
    assert gradients < sums.bytes < 1.2 * gradients


def test_fsdp_gathers_weights_and_no_activations(plans):
    """Each weight once for the forward and at most once for the backward pass."""
    (gathered,) = (c for c in plans["fsdp"].collectives if c.kind == "all-gather")
    weights = plans["data"].memory.parameters
    assert gathered.axes == ("fsdp",)
    assert 0.9 * weights < gathered.bytes < 2.1 * weights


def test_fsdp_divides_parameters_and_optimizer_state(plans):
    for part in ("parameters", "optimizer"):
        whole, share = (getattr(plans[name].memory, part) for name in ("data", "fsdp"))
        # Biases, norms and the kernels of three-channel pictures stay whole.
        assert share == pytest.approx(whole / 4, rel=0.05)


def test_flops_of_a_fixed_batch_fall_as_the_number_of_chips(plans):
    assert plans["data"].compiler_flops == pytest.approx(plans["fsdp"].compiler_flops / 2, rel=0.05)


def test_the_shapes_give_the_compilers_flops(plans):
    assert all(plan.plausible for plan in plans.values())


def test_a_step_computes_no_more_than_its_losses_need(plans):
    """The frozen encoder and the original's features without a backward pass, nothing twice, on every mesh."""
    for plan in plans.values():
        assert sum(part.flops for part in plan.parts) == pytest.approx(plan.flops)
        parts = {part.name: part for part in plan.parts}
        assert set(parts) == {
            "encoder", "decoder, forward", "decoder, backward", "condition branch", "discriminator", "adaptive weight"
        }  # fmt: skip
        assert all(part.flops == pytest.approx(part.least, rel=1e-6) for part in parts.values())


@pytest.mark.parametrize("train_encoder", [False, True])
def test_where_a_steps_flops_go(train_encoder):
    """With LPIPS and recomputation, which is counted by itself; and of a first stage, whose encoder has a gradient."""
    model = dataclasses.replace(SMALL, remat=True, condition=not train_encoder)
    run = RunConfig(init_from="somewhere", train_encoder=train_encoder)
    loss = LossConfig(gan_start=-1)
    config = _config(model=model, run=run, loss=loss, data=DataConfig(batch_size=1, image_size=32))
    plan = plan_step(config, Target("local", jax.devices()[:1], None, "x"))
    parts = {part.name: part for part in plan.parts}
    again = parts.pop("recomputed")
    assert again.least == 0
    assert plan.model_flops + again.flops == pytest.approx(plan.flops)
    assert 0.5 < again.flops / parts["decoder, forward"].flops < 2
    assert {"LPIPS of the original", "LPIPS of the reconstruction"} < set(parts)
    # The first stage's 1x1 convolutions around the latent also have gradients.
    assert all(part.flops == pytest.approx(part.least, rel=1e-2) for part in parts.values())


def test_the_parts_are_the_compilers():
    """The encoder alone, and the gradient of the reconstruction's LPIPS alone, as XLA counts their FLOPs."""
    model = dataclasses.replace(SMALL, encoder_channels=(128, 128), norm_groups=32)
    config = _config(model=model, loss=LossConfig(gan_start=-1), data=DataConfig(batch_size=1, image_size=32))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    jaxpr = compiling.trace_step(config, mesh).jaxpr.jaxpr
    parts = {part.name: part.flops for part in step_parts(config, jaxpr, 1)}
    graphdef, params = structure(model)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    encode = jax.jit(lambda p, x: merge(graphdef, p).encode(x).mode()).lower(params, image)
    assert encode.compile().cost_analysis()["flops"] == pytest.approx(parts["encoder"], rel=0.1)
    lpips, weights = split(nnx.eval_shape(lambda: LPIPS("vgg16", rngs=seeded(0))))

    def distance(image, weights):
        model = merge(lpips, weights)
        return model.distance(model.features(image), jax.lax.stop_gradient(model.features(0.5 * image))).sum()

    both = jax.jit(jax.grad(distance)).lower(image, weights).compile().cost_analysis()["flops"]
    assert both == pytest.approx(parts["LPIPS of the original"] + parts["LPIPS of the reconstruction"], rel=0.1)


def test_the_arguments_are_what_the_compiler_says(plans):
    """CPU layouts pad nothing: what is neither parameter nor optimizer state is the batch and a few small arrays."""
    for name, share in (("data", 1), ("fsdp", 2)):
        pictures = share * 32 * 32 * 4
        assert pictures < plans[name].memory.other < pictures + 2048


@pytest.mark.parametrize(
    ("stride", "padding", "lhs_dilation", "products"),
    [(1, (0, 0), 1, 6 * 3), (1, (1, 1), 1, 8 * 3 - 2), (2, (0, 0), 1, 3 * 3), (1, (0, 0), 2, 7 * 2 + 6)],
)
def test_flops_of_convolutions(stride, padding, lhs_dilation, products):
    """One dimension of 8 with a kernel of 3: two FLOPs for every product of elements that exist."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride,), [padding], (lhs_dilation,))

    x, kernel = jnp.zeros((2, 4, 8)), jnp.zeros((5, 4, 3))
    jaxpr = jax.make_jaxpr(convolve)(x, kernel)
    assert matmul_flops(jaxpr.jaxpr) == 2 * 2 * 4 * 5 * products
    assert matmul_flops(jaxpr.jaxpr) == jax.jit(convolve).lower(x, kernel).cost_analysis()["flops"]


def test_flops_of_loops_and_recomputation():
    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda c, _: (jnp.sin(c @ c), None)), x, None, length=3)[0])

    x = jnp.zeros((4, 4))
    # Forward, again for the backward pass, and two products there.
    assert matmul_flops(jax.make_jaxpr(jax.grad(loss))(x).jaxpr) == 3 * 4 * 2 * 4**3


def test_roofline():
    v5e = CHIPS[0]
    compute = roofline(v5e, flops=197e12, moved=81.9e9, model_flops=98.5e12)
    assert (compute.seconds, compute.bound, compute.mfu) == (pytest.approx(1), "arithmetic", pytest.approx(0.5))
    memory = roofline(v5e, flops=19.7e12, moved=1638e9, model_flops=19.7e12)
    assert (memory.seconds, memory.bound, memory.mfu) == (pytest.approx(2), "memory traffic", pytest.approx(0.05))
    network = roofline(
        v5e, 19.7e12, 1638e9, 19.7e12, {"the network between slices": 4.0, "the network in a slice": 1.0}
    )
    assert (network.seconds, network.bound) == (4, "the network between slices")


def test_the_time_of_collectives_is_counted_by_network_and_is_a_bound(pretended, capsys, monkeypatch):
    sums = (Collective("all-reduce", ("data",), 3, 10**11), Collective(BETWEEN_SLICES, ("slices",), 3, 6 * 10**9))
    plan_step = compiling.plan_step
    monkeypatch.setattr(compiling, "plan_step", lambda *a: dataclasses.replace(plan_step(*a), collectives=sums))
    assert command.main([*pretended, "--data.batch_size=16"]) == 0
    said = capsys.readouterr().out
    v5e = CHIPS[0]
    in_slice, between = 2e11 / v5e.ici, 6e9 / v5e.dcn
    assert re.search(rf"network +{in_slice:.3g} s in a slice and {between:.3g} s between slices, at least", said)
    assert re.search(rf"least time +{between:.3g} s, set by the network between slices", said)


@pytest.mark.parametrize(
    ("peak", "start", "expected"),
    [
        (lambda n: 4 + n, 2, (12, 13)),
        (lambda n: 4 + n, 40, (12, 13)),
        (lambda n: 4 + 0.9 * n + 0.01 * n * n, 8, (11, 12)),
        (lambda n: 20.0 + n, 8, (0, 1)),
    ],
)
def test_the_largest_batch_is_found_in_few_looks(peak, start, expected):
    looks = []

    def look(n):
        looks.append(n)
        return peak(n), peak(n) <= 16

    assert largest_fit(look, 16, start, budget=6) == expected
    assert len(looks) <= 6


def test_messages_of_the_compiler_that_it_lacks_memory():
    newer = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.50G) "
    assert out_of_memory(newer + "exceeds available HBM (15.75G).") == (16.5 * GIB, 15.75 * GIB)
    older = "Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded hbm capacity by ..."
    assert out_of_memory(older) == (0.5 * GIB, 15.75 * GIB)
    assert out_of_memory("INTERNAL: something else") is None


def test_a_pictures_rows_are_split_over_all_chips():
    target = Target("local", jax.devices(), None, "x")
    program = plan_picture(_config(), target, (256, 24))
    assert {c.axes for c in program.collectives} == {("height",)}
    assert "collective-permute" in {c.kind for c in program.collectives}
    one = plan_picture(_config(), dataclasses.replace(target, devices=jax.devices()[:1]), (256, 24))
    assert one.collectives == ()
    assert program.flops == pytest.approx(one.flops / 8)
    # Not an eighth: neighbours' rows come along, and every chip has all keys and values of the attention.
    assert program.memory.temporaries < one.memory.temporaries / 5
    with pytest.raises(InputError, match="for 8 chips a height that is a multiple of 16"):
        plan_picture(_config(), target, (72, 24))


def test_decode_compiles_for_a_tpu_that_is_not_here():
    pytest.importorskip("libtpu")
    target = open_topology("v5e:2x2")
    program = plan_decode(_config(), target)
    assert (len(target.devices), target.chip.name, program.exceeded) == (4, "v5e", None)
    assert program.collectives == ()
    # In so small a model, what is no convolution counts as well.
    assert 1 < program.compiler_flops / program.flops < 2
    least = roofline(target.chip, program.flops, program.moved, program.model_flops)
    assert 0 < least.seconds < 1
    assert 0 < least.mfu <= 1


def test_on_several_slices_the_networks_are_told_apart():
    """Gradients are summed within each slice, and only a part of the sums crosses to the other."""
    pytest.importorskip("libtpu")
    one, two = open_topology("v5e:2x2"), open_topology("2xv5e:2x2")
    assert (len(two.devices), sharding.count_slices(one.devices), sharding.count_slices(two.devices)) == (8, 1, 2)
    mesh = sharding.make_mesh(MeshConfig(), two.devices)
    assert [{d.slice_index for d in half.flat} for half in np.split(mesh.devices, 2)] == [{0}, {1}]

    def step(kernel, x):
        return kernel - jax.grad(lambda kernel: jnp.sum((x @ kernel) ** 2))(kernel)

    kernel = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding.replicated(mesh))
    batch = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    lowered = jax.jit(step, out_shardings=sharding.replicated(mesh)).lower(kernel, batch)
    with no_jax_cache():
        compiled = lowered.compile(dict(two.options))
    found = {c.kind: c for c in collectives(compiled.as_text(), mesh.shape)}
    # Four chips have summed the gradient, and each sends a quarter.
    assert found[BETWEEN_SLICES].bytes == 2 * 1024**2 / 4
    assert found["reduce-scatter"].bytes == found["all-gather"].bytes == 2 * 1024**2
    for config, message in ((MeshConfig(slices=3), "are of 2; set"), (MeshConfig(data=1, fsdp=8), "multiple of the 2")):
        with pytest.raises(ConfigError, match=message):
            sharding.make_mesh(config, two.devices)


CONFIG = """
from asymvq_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(encoder_channels=(32, 32), decoder_channels=(32, 32), encoder_blocks=1, decoder_blocks=1),
        loss=LossConfig(perceptual_weight=0.0, gan_start=-1),
        data=DataConfig(batch_size=12, image_size=16),
        run=RunConfig(init_from="somewhere"),
    )
"""


def test_the_command_prints_writes_and_remembers(tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.py").write_text(CONFIG)
    arguments = ["--config", str(tmp_path / "tiny.py"), "--json", str(tmp_path / "plan.json"), "--mesh.fsdp=2"]
    assert command.main(arguments) == 0
    first = capsys.readouterr().out
    assert "data.batch_size=12 does not split over 8" in first
    assert "8 x cpu (data 4, fsdp 2, tensor 1)" in first
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["batch"] == 16
    memory = written["train step"]["memory"]
    assert memory["peak"] == sum(value for name, value in memory.items() if name != "peak")
    assert "seconds" not in written["decode"], "nothing is known of this device's speed"
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    assert command.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_the_command_plans_one_large_picture(tmp_path, capsys):
    (tmp_path / "tiny.py").write_text(CONFIG)
    arguments = ["--config", str(tmp_path / "tiny.py"), "--json", str(tmp_path / "plan.json"), "--picture=64x24"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "one picture of 24 x 64 px" in out
    assert "over height" in out
    assert "train step" not in out
    assert json.loads((tmp_path / "plan.json").read_text())["memory"]["peak"] > 0


def test_slices_are_named_by_their_chips_too():
    counts = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
    for count, sides in counts.items():
        assert by_sides(f"v5e-{count}") == by_sides(f"v5litepod-{count}") == f"v5e:{sides}"
        assert by_sides(f"2xv6e-{count}") == f"2xv6e:{sides}"
    for name in ("v5p-8", "v5e-5", "v5e:2x2", "v6litepod-4"):
        assert by_sides(name) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v4:2x2x1"], "--topology v4:2x2x1: expected local, or a chip and the sides of a slice"),
        (["--topology=v5e"], "known are v5e: 1x1, 2x2"),
        (["--topology=v5e-5"], "--topology v5e-5: expected local"),
        (["--topology=v5p-8"], "like v5e-256; known are"),
        (["--topology=v5e:2x2x2"], "v5p: 2x2x1"),
        (["--search"], "--search: the memory of cpu is not known; name a chip's with --topology"),
        (["--picture=big"], "--picture big: expected HEIGHTxWIDTH"),
        (["--picture=72x24"], "for 8 chips a height that is a multiple of 16"),
        (["--mesh.data=3"], "does not fit 8 device"),
        (["--json=plan.txt"], "plan.txt: expected a name that ends in one of .json"),
        (["--model.dtyp=float32"], "did you mean --model.dtype?"),
    ],
)
def test_error_messages(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert command.main(["--config=tiny.py", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The command on eight v5e chips, of which 4 GiB, and 2.5 more for each picture of a micro-batch, are needed."""

    def plan_step(config, target):
        each = config.data.batch_size / 8 / config.optimizer.accumulate
        share = 0.5 if config.model.remat else 1.0
        memory = Memory(
            parameters=GIB, optimizer=2 * GIB, other=GIB, temporaries=round(2.5 * GIB * each * share), code=0
        )
        shortage = 16 * GIB if memory.peak > 16 * GIB else None
        return Program(memory, shortage, 1e12, 1e12, 1.01e12, None if shortage else 1e11, (), 0.0)

    monkeypatch.setattr(chips, "open_topology", lambda name, **_: Target(name, jax.devices(), CHIPS[0], "a compiler"))
    monkeypatch.setattr(compiling, "plan_step", plan_step)
    monkeypatch.setattr(compiling, "plan_decode", plan_step)
    (tmp_path / "tiny.py").write_text(CONFIG)
    return ["--config", str(tmp_path / "tiny.py")]


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(pretended, capsys):
    assert command.main([*pretended, "--data.batch_size=64"]) == 0
    out = capsys.readouterr().out
    assert "24.00 GiB of 16.00 GiB: too much by 8.00 GiB" in out
    assert "to try: --model.remat=true, --mesh.data=1 --mesh.fsdp=8, --optimizer.accumulate=2" in out
    assert command.main([*pretended, "--data.batch_size=64", "--suggest"]) == 0
    out = capsys.readouterr().out
    assert "with --model.remat=true: 14.00 GiB of 16.00 GiB: fits" in out
    assert "with --mesh.data=1 --mesh.fsdp=8: 24.00 GiB of 16.00 GiB: too much by 8.00 GiB" in out


def test_what_a_run_costs_at_least(pretended, capsys, tmp_path):
    report = tmp_path / "plan.json"
    words = [*pretended, "--data.batch_size=16", "--price=1.2", "--json", str(report)]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    cost = json.loads(report.read_text())["cost"]
    hours = 100_000 * 1e11 / 819e9 / 3600
    assert cost["hours"] == pytest.approx(hours)
    assert cost["money"] == pytest.approx(hours * 8 * 1.2)
    assert f"run.steps=100000 of 16 pictures: at least {hours:.3g} hours" in said
    assert "a bound, not an estimate" in said
    assert command.main([*pretended, "--price=-1"]) == 2
    assert "--price -1.0: expected zero or more" in capsys.readouterr().err


def test_search(pretended, capsys, tmp_path):
    report = tmp_path / "plan.json"
    assert command.main([*pretended, "--data.batch_size=16", "--search", "--json", str(report)]) == 0
    assert "largest batch: 4 a chip fits (--data.batch_size=32); 5 does not" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["largest batch per chip"] == 4
    assert written["train step"]["seconds"] == pytest.approx(1e11 / 819e9)


def test_table_of_slices(pretended, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert plan_table.main([*pretended, "--topologies=v5e:2x4,v6e:2x4", "--per-chip=4", "--mesh.fsdp=2"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    cells = [dict(zip(header.split(" | "), row.split(" | "), strict=True)) for row in rows]
    assert [row["| slice"] for row in cells] == ["| v5e:2x4", "| v6e:2x4"]
    assert cells[0]["batch"] == "32"
    assert cells[0]["peak memory"] == "14.00 GiB of 16.00 GiB: fits"
    assert cells[0]["least time"] == f"{1e11 / 819e9 * 1e3:.0f} ms"
    assert plan_table.main([*pretended, "--topologies=v5e:2x4", "--per-chip=8"]) == 0
    assert "24.00 GiB of 16.00 GiB: too much by 8.00 GiB" in capsys.readouterr().out.splitlines()[-1]
    assert plan_table.main([*pretended, "--per-chip=0"]) == 2
    assert "--per-chip=0: expected at least 1" in capsys.readouterr().err


def test_variants_say_what_to_set():
    target = Target("local", jax.devices(), None, "x")
    config = _config(data=DataConfig(batch_size=16, image_size=32))
    assert list(advice.variants(config, target)) == [
        "--model.remat=true",
        "--mesh.data=1 --mesh.fsdp=8",
        "--optimizer.accumulate=2",
    ]


def test_flops_of_kernels_and_parts_of_a_mesh():
    """A kernel's products run over its grid, a part's on every device."""
    x = jax.ShapeDtypeStruct((8, 2, 1024, 40), jnp.bfloat16)
    expected = 8 * 2 * 4 * 1024**2 * 40
    assert matmul_flops(jax.make_jaxpr(layers._flash)(x, x, x).jaxpr) == expected
    mesh = sharding.make_mesh(MeshConfig())
    part = sharding.batch_sharding(mesh).spec
    split = jax.shard_map(layers._flash, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    assert matmul_flops(jax.make_jaxpr(split)(x, x, x).jaxpr) == expected


def test_generation(tmp_path, capsys):
    """The whole loop of a small UNet on the devices present: its FLOPs are the network's, times the steps."""
    stored = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [16, 32],
        "cross_attention_dim": 24,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "in_channels": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = read_unet_config(stored, "config.json")
    target = open_topology("local")
    few, many = (plan_denoising(config, target, (8, 8, 16), steps, 7) for steps in (2, 6))
    assert many.flops == pytest.approx(3 * few.flops)
    graphdef, shapes = split(nnx.eval_shape(lambda: UNet(config, rngs=seeded(0))))
    arguments = jnp.zeros((2, 8, 16, 9)), jnp.zeros((2,)), jnp.zeros((2, 7, 24))
    once = matmul_flops(jax.make_jaxpr(lambda p, *a: merge(graphdef, p)(*a))(shapes, *arguments))
    assert few.flops == pytest.approx(2 * once)
    count = sum(math.prod(x.shape) for x in shapes.values())
    assert 2 * count < few.memory.parameters < 2.2 * count
    assert plan_denoising_command.main(["--unet", str(tmp_path), "--size", "64x128", "--steps", "2"]) == 0
    assert "8 pictures of 128 x 64 px, 2 steps with guidance" in capsys.readouterr().out
    assert plan_denoising_command.main(["--unet", str(tmp_path), "--size", "60x128"]) == 2
    assert "expected multiples of 16 px" in capsys.readouterr().err


def test_generation_on_a_tpu():
    """Long attention never has its scores in main memory, and the kernel's products are counted over its grid."""
    pytest.importorskip("libtpu")
    config = UNetConfig(channels=(32, 32), blocks=1, attention=(True, False), heads=(2, 2), context=16, norm_groups=8)
    program = plan_denoising(config, open_topology("v5e:2x2"), (4, 32, 64), 3, 7)
    scores = 2 * 2 * (32 * 64) ** 2 * 2
    assert program.memory.temporaries < scores
    assert program.collectives == ()
    # The softmax counts as well, in so small a model.
    assert 1 < program.compiler_flops / program.flops < 1.2
