"""The page's arithmetic and messages, and the page itself in a headless browser, if the machine has one."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from processes import DEADLINE
from skimage.metrics import peak_signal_noise_ratio

from asymvq_jax import inference
from asymvq_jax.commands.page import main
from asymvq_jax.config import ModelConfig
from asymvq_jax.errors import InputError
from asymvq_jax.evaluation import page
from asymvq_jax.evaluation.finish import WAYS, finish, png
from asymvq_jax.evaluation.page import Decoded, compare, describe, load, read_painting
from asymvq_jax.evaluation.rows import edge_of
from asymvq_jax.files import images
from asymvq_jax.models.autoencoder import Autoencoder
from asymvq_jax.models.checkpoints import load_model, save_model
from asymvq_jax.models.parameters import merge, split

CONFIG = ModelConfig(encoder_channels=(32, 32, 32), decoder_channels=(32, 32, 32), encoder_blocks=1, decoder_blocks=1)
# Starts the page, names whatever it connects to or looks up, and heeds an interrupt even as a job in the background.
LAUNCHER = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, args: print(event, args, flush=True) if event in LOOKED_AT else None)
LOOKED_AT = ("socket.connect", "socket.getaddrinfo")
runpy.run_module("asymvq_jax.demo", run_name="__main__")
"""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# No sandbox, because root can have none; and no errands of Chromium's own.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def models():
    """A model, and a plain one of the same encoder whose decoder is another."""
    model = Autoencoder(CONFIG, rngs=nnx.Rngs(0))
    graphdef, other = split(Autoencoder(dataclasses.replace(CONFIG, condition=False), rngs=nnx.Rngs(1)))
    params = split(model)[1]
    plain = {name: value if name.startswith("decoder.") else params[name] for name, value in other.items()}
    return model, merge(graphdef, plain)


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [folder / "model", folder / "plain"]
    for path, model in zip(paths, models, strict=True):
        save_model(path, model)
    return [str(path) for path in paths]


def _picture(height=37, width=51):
    rng = np.random.default_rng(0)
    mask = np.zeros((height, width, 1), np.float32)
    mask[10:20, 12:30] = 1
    # Blue, as none of the page's own pictures is.
    return rng.integers((0, 0, 200), (100, 100, 256), (height, width, 3)).astype(np.uint8), mask


def _png(path: Path, array: np.ndarray) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def test_the_three_ways_and_their_numbers(models):
    image, mask = _picture()
    model, plain = models
    ways = compare(model, plain, image, mask)
    pixels = images.to_float(image)[None]
    decoded = images.to_uint8(inference.decode(plain, inference.encode(plain, pixels), size=image.shape[:2])[0])
    np.testing.assert_array_equal(ways[0].image, decoded)
    np.testing.assert_array_equal(ways[1].image, np.where(mask == 1, decoded, image))
    np.testing.assert_array_equal(ways[2].image, inference.inpaint(model, image, mask).image)
    kept = mask[..., 0] == 0
    for way in (ways[0], ways[2]):
        np.testing.assert_allclose(way.psnr, peak_signal_noise_ratio(image[kept], way.image[kept]))
        np.testing.assert_allclose(10 * np.log10(4 / way.preservation_error), way.psnr)
        difference = np.abs(way.image.astype(float) - image.astype(float)).mean(-1)
        np.testing.assert_allclose(way.error_map[..., 1], np.minimum(4 * difference, 255), atol=1)
    assert ways[1].preservation_error == 0
    assert not ways[1].error_map[kept].any()
    assert ways[1].error_map[~kept].any()


def test_without_a_plain_autoencoder_ours_stands_in(models):
    image, mask = _picture()
    model, plain = models
    alone = compare(model, None, image, mask)
    latent = inference.encode(model, images.to_float(image)[None])
    decoded = images.to_uint8(inference.decode(model, latent, size=image.shape[:2])[0])
    np.testing.assert_array_equal(alone[0].image, decoded)
    assert (alone[0].image != compare(model, plain, image, mask)[0].image).any()


def test_numbers_as_text(models):
    picture, _ = _picture()
    assert "**25.0 dB**" in describe(Decoded(picture, picture, 0.0126491, 25.0))
    assert "**1,264.9** x 1e-5" in describe(Decoded(picture, picture, 0.0126491, 25.0))
    assert "**∞ dB**" in describe(Decoded(picture, picture, 0.0, float("inf")))
    full = compare(models[0], None, picture, np.ones((*picture.shape[:2], 1), np.float32))
    assert all("covers the whole picture" in describe(way) for way in full)


def test_large_pictures_are_scaled_down_and_small_ones_are_not(tmp_path):
    image, _ = _picture()
    np.testing.assert_array_equal(load(_png(tmp_path / "a.png", image)), image)
    flat = np.full((1500, 3000, 3), (10, 20, 30), np.uint8)
    assert load(_png(tmp_path / "b.png", flat)).shape == (512, 1024, 3)
    assert (load(_png(tmp_path / "b.png", flat)) == (10, 20, 30)).all()
    assert load(_png(tmp_path / "c.png", flat[:, :1])).shape == (1024, 1, 3)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(images.ImageError, match=r"^broken\.png is not a readable picture"):
        load(str(tmp_path / "broken.png"))


def test_what_was_painted(tmp_path):
    image, mask = _picture()
    layers = [np.zeros((37, 51, 4), np.uint8) for _ in range(2)]
    layers[0][10:20, 12:20] = 255
    layers[1][10:20, 20:30] = (255, 255, 255, 140)
    layers[1][0, 0] = (255, 255, 255, 100)
    background = _png(tmp_path / "image.png", image)
    paths = [_png(tmp_path / f"{i}.png", layer) for i, layer in enumerate(layers)]
    picture, painted = read_painting({"background": background, "layers": paths, "composite": None})
    np.testing.assert_array_equal(picture, image)
    np.testing.assert_array_equal(painted, mask)
    clear = _png(tmp_path / "clear.png", 0 * layers[0])
    for nothing in ([], [clear]):
        with pytest.raises(inference.InputError, match="Nothing is painted yet"):
            read_painting({"background": background, "layers": nothing, "composite": None})
    # A white picture is a picture.
    white = _png(tmp_path / "white.png", np.full((37, 51, 3), 255, np.uint8))
    picture, painted = read_painting({"background": white, "layers": paths})
    assert (picture == 255).all()
    np.testing.assert_array_equal(painted, mask)
    for none in (None, {"background": None, "layers": paths}):
        with pytest.raises(inference.InputError, match="There is no picture yet"):
            read_painting(none)


@pytest.fixture
def served(monkeypatch):
    """The arguments of `serve`, in the place of serving; Gradio passes for installed."""
    calls = []
    monkeypatch.setattr(page, "serve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return calls


def test_command_line_opens_with_the_models_inside_the_package(models, checkpoints, served, monkeypatch, tmp_path):
    places = {"tiny": checkpoints[0], "tiny-plain": checkpoints[1]}
    monkeypatch.setattr("asymvq_jax.convert.reading.is_embedded", lambda source: source in places)
    monkeypatch.setattr(
        "asymvq_jax.convert.reading.load_model", lambda name, *a, **o: load_model(places.get(name, name), *a, **o)
    )
    assert main(["--port=1234", "--dtype=bfloat16"]) == 0
    model, plain, *address = served.pop()
    assert address == ["127.0.0.1", 1234]
    assert model.config == dataclasses.replace(CONFIG, dtype="bfloat16")
    assert plain.config == dataclasses.replace(model.config, condition=False)
    for loaded, original in zip((model, plain), models, strict=True):
        expected = split(original)[1]
        for name, value in split(loaded)[1].items():
            np.testing.assert_array_equal(value, expected[name])
    assert main([f"--checkpoint={checkpoints[0]}"]) == 0
    model, plain, *_ = served.pop()
    assert model.config == CONFIG
    assert plain is None


def test_command_line_messages(checkpoints, served, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "other", Autoencoder(CONFIG, rngs=nnx.Rngs(5)))
    ours, plain = checkpoints
    for arguments, message in (
        ([f"--checkpoint={tmp_path / 'none'}"], "no checkpoint at"),
        (["--port=99999"], "--port 99999: expected 1 to 65535"),
        ([f"--checkpoint={plain}"], f"--checkpoint {plain} has no condition branch"),
        ([f"--checkpoint={ours}", f"--plain={tmp_path / 'other'}"], "the plain autoencoder has another encoder"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([f"--checkpoint={ours}"]) == 2
    assert "the page needs Gradio; install it in a clone with: pip install -e '.[demo]'" in capsys.readouterr().err
    assert not served


@pytest.fixture(scope="module")
def address(checkpoints, tmp_path_factory):
    """Of the page, served by a process of its own, because Gradio's warnings are not ours; and that process's log."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("page") / "log"
    options = [f"--checkpoint={checkpoints[0]}", f"--plain={checkpoints[1]}", f"--port={port}"]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with log.open("w") as file:
        command = [sys.executable, "-c", LAUNCHER, *options]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + DEADLINE
    while f"{url} (Ctrl-C" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    yield url, log
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0, log.read_text()


@pytest.fixture(scope="module")
def browser():
    """Playwright's own Chromium, or else the machine's."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install -e '.[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if os.path.exists(own) else next(filter(None, map(shutil.which, CHROMIUM)), None)
        if path is None:
            pytest.skip(f"no browser: run python -m playwright install chromium, or install {' or '.join(CHROMIUM)}")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Visitor:
    """Somebody who uses the page."""

    def __init__(self, browser, url: str, width: int = 1300) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 1000})
        self.page.set_default_timeout(DEADLINE * 1000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.canvas = self.page.locator("canvas").first
        self.canvas.wait_for()
        self.settle()

    def settle(self) -> None:
        """Until the editor has sent its contents to the server."""
        before = -1
        while before != len(self.requests):
            before = len(self.requests)
            self.page.wait_for_timeout(1500)

    def choose(self, button: str, path: str) -> None:
        """Gives a button the file that it asks for."""
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role("button", name=button).click()
        chooser.value.set_files(path)

    def load(self, path: str) -> None:
        """A blue picture."""
        self.choose("Load a picture", path)
        self.wait_for_colour((0, 0, 190), (120, 120, 255))

    def load_mask(self, path: str, message: str) -> None:
        """Opens the part for mask files, chooses one, and waits for what is said of it."""
        self.page.get_by_text("Mask file: added to what is painted").click()
        self.choose("Click to upload", path)
        self.page.get_by_text(message).wait_for()

    def wait_for_colour(self, low: tuple[int, int, int], high: tuple[int, int, int]) -> None:
        """Until the middle of the editor has a mean colour in a range."""
        end = time.monotonic() + DEADLINE
        while True:
            with Image.open(io.BytesIO(self.canvas.screenshot())) as shot:
                width, height = shot.size
                middle = np.asarray(shot.convert("RGB"))[height // 2 - 5 : height // 2 + 5, width // 2 - 5 :][:, :10]
            if (middle.mean((0, 1)) >= low).all() and (middle.mean((0, 1)) <= high).all():
                return self.settle()
            assert time.monotonic() < end, middle.mean((0, 1))
            self.page.wait_for_timeout(200)

    def paint(self) -> None:
        """A stroke through the middle of the editor."""
        box = self.canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 60, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 60, y, steps=8)
        self.page.mouse.up()
        self.wait_for_colour((255, 255, 255), (255, 255, 255))

    def press(self, message: str) -> None:
        """Presses the button, and waits for a text."""
        self.page.get_by_role("button", name="Decode").click()
        self.page.get_by_text(message).wait_for()

    def results(self, selector: str = ".image-frame img", number: int = 6) -> list[np.ndarray]:
        """The pictures that are shown, (h, w, 3) uint8."""
        shown = self.page.locator(selector)
        shown.nth(number - 1).wait_for()
        return [images.decode(self.page.request.get(image.get_attribute("src")).body()) for image in shown.all()]

    def finish(self) -> list[np.ndarray]:
        """Presses the other button, and waits for the pictures before and after, and of the edge enlarged."""
        self.page.get_by_role("button", name="Finish").click()
        self.page.locator("button:enabled", has_text="Save with its settings").wait_for()
        return self.results("[data-testid=imageslider-image]", 4)


def test_the_page_in_a_browser(browser, address, models, tmp_path):
    url, log = address
    image, _ = _picture(96, 150)
    visitor = Visitor(browser, url)
    visitor.load(_png(tmp_path / "picture.png", image))
    visitor.press("Nothing is painted yet")
    visitor.paint()
    visitor.press("150 x 96 px")
    shown = visitor.results()
    assert len(shown) == 6
    # What was painted shows in the paste, because the plain decode differs from the original everywhere.
    painted = (shown[2] != image).any(-1, keepdims=True)
    assert (shown[0] != image).any(-1).all()
    assert painted[48, 65:85].all()
    assert not painted[[0, -1]].any()
    expected = compare(*models, image, painted.astype(np.float32))
    for way, picture, error in zip(expected, shown[::2], shown[1::2], strict=True):
        np.testing.assert_allclose(picture.astype(int), way.image.astype(int), atol=1)
        np.testing.assert_allclose(error.astype(int), way.error_map.astype(int), atol=4)
    assert (shown[4] != shown[0]).any()
    kept = ~painted[..., 0]
    numbers = visitor.page.get_by_text("Kept pixels: PSNR").all_inner_texts()
    assert "PSNR ∞ dB" in numbers[1]
    for text, picture in ((numbers[0], shown[0]), (numbers[2], shown[4])):
        assert f"PSNR {peak_signal_noise_ratio(image[kept], picture[kept]):.1f} dB" in text
    # Neither the browser nor the server reached for anything else.
    assert not [request for request in visitor.requests if not request.startswith((f"{url}/", "data:", "blob:"))]
    reached = re.findall(r"^socket\..*", log.read_text(), re.MULTILINE)
    assert reached
    assert not [line for line in reached if "'127.0.0.1'" not in line]


def _strokes(mask: np.ndarray) -> np.ndarray:
    """A mask as an editor saves it: white strokes on transparency."""
    return np.repeat(mask.astype(np.uint8) * 255, 4, axis=-1)


def _check_width(page) -> None:
    """Nothing is wider than the screen, not even where that cannot be scrolled to."""
    wider = page.evaluate(
        """() => [...document.body.querySelectorAll("*")]
            .filter(part => part.getBoundingClientRect().right > innerWidth + 1)
            .map(part => `${part.tagName} ${part.className}: ${part.textContent.slice(0, 50)}`)"""
    )
    assert not wider
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_mask_file_and_the_finish_on_a_phone(browser, address, models, tmp_path):
    image, mask = _picture(96, 150)
    visitor = Visitor(browser, address[0], width=390)
    page = visitor.page
    _check_width(page)
    for button in ("Load a picture", "Decode", "Finish", "Save with its settings", "Undo"):
        assert page.get_by_role("button", name=button).is_visible(), button
    for tool in ("Brush", "Erase"):
        assert page.get_by_label(tool).first.is_visible(), tool
    # A mask for another picture than the example is refused.
    name = f"{'long_name_' * 15}.png"
    message = f"mask {name} has 150 x 96 px and the picture"
    visitor.load_mask(_png(tmp_path / name, _strokes(mask)), f"Refused: {message}")
    page.get_by_role("button", name="Finish").click()
    page.get_by_test_id("toast-text").get_by_text(message).wait_for()
    page.get_by_test_id("toast-close").click()
    visitor.load(_png(tmp_path / "picture.png", image))
    page.get_by_text(f"{name}: mask from alpha (white strokes on transparency)").wait_for()
    visitor.press("150 x 96 px, 1% to be generated")
    np.testing.assert_array_equal((visitor.results()[2] != image).any(-1), mask[..., 0] == 1)
    before, after, edge_before, edge_after = visitor.finish()
    np.testing.assert_array_equal(before, image)
    expected, settings = finish(models[0], image, mask, "none", False, 1.5)
    np.testing.assert_allclose(after.astype(int), expected.astype(int), atol=1)
    assert (after != image).any()
    np.testing.assert_array_equal(edge_before, edge_of(image, mask))
    np.testing.assert_array_equal(edge_after, edge_of(after, mask))
    with page.expect_download() as download:
        page.get_by_role("button", name="Save with its settings").click()
    with Image.open(download.value.path()) as saved:
        assert json.loads(saved.info["asymvq inpaint"]) == settings
        np.testing.assert_array_equal(np.asarray(saved), after)
    _check_width(page)


def test_a_program_names_the_painting_alone(address, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = pytest.importorskip("gradio_client")
    image, mask = _picture(48, 64)
    painting = {
        "background": client.handle_file(str(_png(tmp_path / "picture.png", image))),
        "layers": [client.handle_file(str(_png(tmp_path / "layer.png", _strokes(mask))))],
        "composite": None,
    }
    said, *_ = client.Client(address[0], verbose=False).predict(painting, api_name="/press")
    assert said.startswith("64 x 48 px")


def test_finishing_and_its_settings(models):
    image, mask = _picture(64, 80)
    kept = mask[..., 0] == 0
    for way in WAYS:
        made, settings = finish(models[0], image, mask, way, False, 1.5)
        assert settings["keep"] == ("model" if way == "by the decoder" else "exact")
        same = (made[kept] == image[kept]).all()
        assert same == (way in ("none", "tone", "poisson"))
    made, settings = finish(models[0], image, mask, "none", True, 2.0)
    np.testing.assert_array_equal(made[kept], image[kept])
    assert settings["crop-and-stitch"]
    with Image.open(io.BytesIO(png(made, settings))) as saved:
        assert json.loads(saved.info["asymvq inpaint"]) == settings
        np.testing.assert_array_equal(np.asarray(saved), made)
    with pytest.raises(InputError, match="keeps pixels exactly"):
        finish(models[0], image, mask, "by the decoder", True, 2.0)
