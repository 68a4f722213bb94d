"""The command `asymvq`: help, errors and exit codes of every subcommand, and the names of earlier releases."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import jax
import pytest
from processes import ROOT

import asymvq_jax
from asymvq_jax import former
from asymvq_jax.__main__ import ABOUT, COMMANDS, main
from asymvq_jax.commands.entry import command
from asymvq_jax.config import Config, MaskConfig, Settings, load_config
from asymvq_jax.config.command_line import names
from asymvq_jax.errors import ConfigError, LostPeerError, NonFiniteError

TIMEOUT = 120
# Everything that a user may ask help for.
ASKED = [[name] for name in COMMANDS] + [
    ["generate", "text"],
    ["generate", "inpaint"],
    ["generate", "edit"],
    ["plan", "table"],
    ["plan", "denoising"],
]
HELP = """
import contextlib, io, json, sys
from asymvq_jax.__main__ import main
texts = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    texts[" ".join(words)] = out.getvalue()
slow = [n for n in ("jax", "flax", "transformers", "torch", "cv2", "numpy", "grain", "orbax") if n in sys.modules]
print(json.dumps({"texts": texts, "slow": slow}))
"""


@pytest.fixture(scope="module")
def help_texts():
    """The help of every command, and the slow modules that it took to print them."""
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps([[], *ASKED])],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_loads_nothing_slow(help_texts):
    assert help_texts["slow"] == []


def test_the_first_help_names_every_command(help_texts):
    assert help_texts["texts"][""].rstrip() == ABOUT.rstrip()
    assert re.findall(r"^  ([a-z-]+)  ", ABOUT, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_every_command_has_help(help_texts, words):
    text = help_texts["texts"][" ".join(words)]
    assert text.startswith(f"usage: asymvq {' '.join(words)} ")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize("words", [words for words in ASKED if words[0] not in ("benchmark",)], ids=" ".join)
def test_every_option_is_explained(help_texts, words):
    text = re.sub(r"[│╭╮╰╯─|+]|-{3,}", " ", help_texts["texts"][" ".join(words)])
    options = re.split(r"^ {0,4}(?=--|-h)", text, flags=re.MULTILINE)[1:]
    bare = [o for o in options if re.fullmatch(r"--\S+( \S+)?\s+(\((default|required).*)?", o, re.DOTALL)]
    assert not bare


@pytest.mark.parametrize("words", ["train", "evaluate", "plan"])
def test_the_help_lists_every_field_of_the_configuration(help_texts, words):
    text = help_texts["texts"][words].replace("-", "_")
    listed = set(re.findall(r"__([a-z_]+\.[a-z_.0-9]+)", text))
    flags = {name.replace("no_", "") for name in listed} | listed
    assert set(names(Config)) <= flags


def test_version_names_what_computes(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"asymvq-jax {asymvq_jax.__version__}" in out
    assert f"jax {jax.__version__}" in out
    assert "8 x cpu" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: asymvq trian: expected one of inpaint, decode, generate"),
        (["trian"], "did you mean train?"),
        (["generate", "tekst"], "did you mean text?"),
        (["train"], "error: --config is missing; see asymvq train --help"),
        (["inpaint", "--image=a.png", "--mask=b.png"], "error: --out is missing; see asymvq inpaint --help"),
        (["inpaint", "--imge=a.png"], "error: --imge is not an option; did you mean --image?"),
        (["export", "--checkpoint"], "error: --checkpoint: a value is missing; write --checkpoint=VALUE"),
        (["export", "a", "b.jax", "--batch=many"], "error: --batch='many': expected int"),
        (["convert", "a", "b", "--to=torch"], "error: --to='torch': expected one of jax, diffusers, ldm"),
        (["convert", "a", "b", "c"], "error: 'c': expected --option=value or --option value"),
        (["train", "--config=x3"], "error: config file x3 does not exist; did you mean x2? Published are base, "),
        (["train", "--config=x2", "--run.step=3"], "did you mean --run.steps?"),
        (["train", "--config=x2", "--run.steps=0"], "error: run.steps=0: expected at least 1"),
        (["evaluate", "--config=demo", "--chekpoint=a"], "--chekpoint is not an option; did you mean --checkpoint?"),
        (["evaluate", "--config=demo", "--checkpoint=a", "--latents=b"], "error: --latents needs --inception WEIGHTS"),
        (["build-data", "--out=a", "--name=b"], "expected --images SOURCE and --out TARGET to build"),
        (["page", "--port=0"], "error: --port 0: expected 1 to 65535"),
        (["benchmark", "decod"], "did you mean decode?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do nothing."""

    # A picture.
    image: str
    # A folder.
    out: str = "here"
    # How.
    way: Literal["fast", "slow"] | None = None
    # Whether.
    soft_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class WithSettings:
    """Do nothing with a configuration."""

    # The configuration.
    config: str
    # A number.
    count: int = 3
    settings: Settings


def parsed(kind, *words, positional=()):
    seen = []
    assert command("asymvq test", kind, seen.append, positional=positional)(list(words)) == 0
    return seen[0]


def test_options_are_spelt_in_every_usual_way():
    expected = Options(image="a b.png", out="there", way="fast", soft_mask=True)
    for words in (
        ["--image=a b.png", "--out=there", "--way=fast", "--soft-mask"],
        ["--image", "a b.png", "--out", "there", "--way", "fast", "--soft_mask"],
        ["--soft-mask", "a b.png", "--way", "fast", "there"],
        ["a b.png", "--soft-mask", "--way=fast", "--out=there"],
    ):
        assert parsed(Options, *words, positional=("image", "out")) == expected
    # Values that look like options or like nothing.
    assert parsed(Options, "--image=--x", "--out=").image == "--x"
    assert parsed(Options, "--image=-1").image == "-1"


def test_a_configuration_beside_options():
    options = parsed(
        WithSettings, "--count", "5", "--config", "demo", "--run.steps", "7", "--model.norm-groups=8",
        "--data.crop=1,1", "--data.mask=thin_512", "--data.mask.full_probability=0", "--model.remat", "true",
    )  # fmt: skip
    overrides = ["--run.steps=7", "--model.norm_groups=8", "--data.crop=1,1", "--model.remat=true"]
    overrides += ["--data.mask=thin_512", "--data.mask.full_probability=0"]
    assert options == WithSettings(config="demo", count=5, settings=load_config(ROOT / "configs/demo.py", overrides))
    assert options.settings.data.mask.resolution == 512
    assert options.settings.data.mask != MaskConfig()


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("a=1: expected 2"), 2, ["error: a=1: expected 2"]),
        (NonFiniteError("step 3: not finite"), 1, ["error: step 3: not finite"]),
        (LostPeerError("gone"), 76, ["error: gone"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (KeyboardInterrupt("interrupted; go on"), 130, ["interrupted; go on"]),
    ],
)
def test_exit_codes(error, code, lines, capsys, monkeypatch):
    def work(options):
        raise error

    failing = command("asymvq test", Options, work)
    assert failing(["--image=a"]) == code
    assert capsys.readouterr().err.splitlines() == lines
    if isinstance(error, Exception):
        assert failing(["--image=a", "--traceback"]) == code
        stack = capsys.readouterr().err.splitlines()
        assert stack[0].startswith("Traceback")
        assert stack[-1:] == lines
        monkeypatch.setenv("ASYMVQ_TRACEBACK", "1")
        assert failing(["--image=a"]) == code
        assert capsys.readouterr().err.startswith("Traceback")


IMPORTING = """
import signal
from dataclasses import dataclass
from asymvq_jax.commands.entry import command, leave

@dataclass(frozen=True, kw_only=True)
class Options:
    "Nothing."

def work(options):
    import extension

# As in a terminal: a shell that starts the tests in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
leave(command("asymvq test", Options, work)([]))
"""
# What NumPy's and JAX's extensions make of Ctrl-C while they are loaded.
EXTENSION = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise ImportError("failed to import") from None
"""


def test_ctrl_c_during_an_import_does_not_become_an_import_error(tmp_path):
    (tmp_path / "extension.py").write_text(EXTENSION)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={"PATH": "", "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_bug_is_not_hidden():
    def work(options):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        command("asymvq test", Options, work)(["--image=a"])
    assert command("asymvq test", Options, lambda options: 75)(["--image=a"]) == 75


def test_the_configurations_are_found_by_name_from_anywhere(monkeypatch, tmp_path):
    expected = load_config(ROOT / "configs" / "x2.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("x2") == expected
    # A file of the user's own comes first.
    (tmp_path / "x2").write_text((ROOT / "configs" / "base.py").read_text())
    assert load_config("x2") == load_config(ROOT / "configs" / "base.py")


@pytest.mark.parametrize(("name", "words"), former.COMMANDS.items())
def test_former_commands_are_found(name, words):
    assert words.split()[0] in COMMANDS
    spec = importlib.util.find_spec(f"asymvq_jax.{name}")
    assert f"run({name!r})" in spec.loader.get_source(spec.name) or "run" in spec.loader.get_code(spec.name).co_names


def test_former_commands_say_what_took_their_place(tmp_path):
    command = [sys.executable, "-m", "asymvq_jax.data.masks", str(tmp_path / "masks.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=ROOT)
    assert done.returncode == 2
    note, error = done.stderr.splitlines()
    assert note == "note: python -m asymvq_jax.data.masks is now: asymvq masks"
    assert error.startswith(f"error: {tmp_path / 'masks.txt'}: expected")


@pytest.mark.parametrize(("name", "now"), former.MODULES.items())
def test_former_modules_are_what_took_their_place(name, now):
    assert importlib.import_module(f"asymvq_jax.{name}") is importlib.import_module(f"asymvq_jax.{now}")


def test_the_public_names():
    assert {"Config", "InpaintResult", "convert", "decode", "encode", "inpaint", "load_model"} <= set(dir(asymvq_jax))
    for name in dir(asymvq_jax):
        assert callable(getattr(asymvq_jax, name))
    # The former module of that name does not hide the function.
    importlib.import_module("asymvq_jax.inpaint")
    assert asymvq_jax.inpaint is importlib.import_module("asymvq_jax.inference").inpaint
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        asymvq_jax.paint  # noqa: B018


def test_the_package_convert_converts(tmp_path):
    with pytest.raises(asymvq_jax.UserError, match="no checkpoint at"):
        asymvq_jax.convert(tmp_path / "none", tmp_path / "out")
