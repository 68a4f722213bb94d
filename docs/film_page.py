"""Films the page at work, as an animated WebP.

    python docs/film_page.py --out docs/page.webp

Starts `asymvq page` with the models inside the package, paints a mask on its first example in a headless Chromium,
decodes, finishes, and moves the slider between before and after. Needs the demo's and the tests' packages:
pip install -e '.[test]'.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

WIDTH, HEIGHT = 1300, 930
# Of the film: its width, px, how long a frame is shown, ms, and WebP's quality.
SHOWN, MOVE_MS, LOOK_MS, QUALITY = 800, 80, 1800, 50
# How long anything may take, ms: the models are compiled for the picture's size.
LIMIT_MS = 300_000
# Strokes of the mask, as shares of the editor's canvas: a blob beside its middle.
STROKES = [((0.38, 0.44 + 0.03 * row), (0.48, 0.44 + 0.03 * row)) for row in range(5)]
# Where the slider goes, as shares of its picture.
SLIDES = [0.5 - 0.03 * step for step in range(9)] + [0.26 + 0.05 * step for step in range(10)]


class Film:
    """Frames and how long each is shown."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.times: list[int] = []

    def take(self, milliseconds: int) -> None:
        """What the browser shows now."""
        with Image.open(io.BytesIO(self.page.screenshot())) as shot:
            size = (SHOWN, round(SHOWN * shot.height / shot.width))
            self.frames.append(shot.convert("RGB").resize(size, Image.Resampling.LANCZOS))
        self.times.append(milliseconds)

    def scroll(self, to: Locator, steps: int = 6) -> None:
        """Brings the top of a part of the page to the screen's."""
        start, box = self.page.evaluate("window.scrollY"), _box(to)
        for step in range(1, steps + 1):
            self.page.evaluate(f"window.scrollTo(0, {start + (box['y'] - 20) * step / steps})")
            self.take(MOVE_MS)

    def write(self, path: Path) -> None:
        """All frames, again and again."""
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=self.times, loop=0, quality=QUALITY, method=6)


def _box(part: Locator) -> Any:
    box = part.bounding_box()
    assert box is not None
    return box


def paint(film: Film, canvas: Locator) -> None:
    """Paints the mask."""
    box, mouse = _box(canvas), film.page.mouse
    for (x0, y0), (x1, y1) in STROKES:
        mouse.move(box["x"] + x0 * box["width"], box["y"] + y0 * box["height"])
        mouse.down()
        for share in (0.5, 1.0):
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            film.page.wait_for_timeout(100)
            film.take(MOVE_MS)
        mouse.up()


def slide(film: Film, pictures: Locator) -> None:
    """Drags the slider over the pictures before and after."""
    box, mouse = _box(pictures.first), film.page.mouse
    middle = box["y"] + box["height"] / 2
    mouse.move(box["x"] + SLIDES[0] * box["width"], middle)
    mouse.down()
    for share in SLIDES:
        mouse.move(box["x"] + share * box["width"], middle)
        film.page.wait_for_timeout(50)
        film.take(MOVE_MS)
    mouse.up()


def act(page: Page, url: str) -> Film:
    """Uses the page as a visitor does."""
    film = Film(page)
    page.set_default_timeout(LIMIT_MS)
    page.goto(url)
    canvas = page.locator("canvas").first
    canvas.wait_for()
    # The editor draws its picture, and sends it to the server.
    page.wait_for_timeout(4000)
    film.take(LOOK_MS)
    paint(film, canvas)
    page.wait_for_timeout(3000)
    film.take(LOOK_MS)
    page.get_by_role("button", name="Decode").click()
    page.wait_for_timeout(500)
    film.take(LOOK_MS)
    page.locator(".image-frame img").nth(5).wait_for()
    page.wait_for_timeout(2000)
    film.scroll(page.get_by_role("heading", name="Plain decode"))
    film.take(2 * LOOK_MS)
    film.scroll(page.get_by_role("heading", name="Finish"))
    page.get_by_role("button", name="Finish").click()
    page.locator("button:enabled", has_text="Save with its settings").wait_for()
    pictures = page.locator("[data-testid=imageslider-image]")
    pictures.nth(1).wait_for()
    page.wait_for_timeout(2000)
    film.scroll(page.get_by_role("heading", name="Finish"), steps=2)
    film.take(LOOK_MS)
    slide(film, pictures)
    film.take(LOOK_MS)
    return film


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the film, *.webp")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "asymvq_jax", "page", "--port", str(port)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            film = act(browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}), url)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    film.write(options.out)
    print(f"{options.out}: {len(film.frames)} frames, {options.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
