"""Films the page at work, as an animated WebP.

    python docs/film_page.py --checkpoint tiny --plain tiny-plain --out docs/page.webp

Starts `asymvq page`, paints a mask on its first example in a headless Chromium, decodes, and looks at the results.
Needs the demo's and the tests' packages: pip install -e '.[test]'.
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
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1500, 1000
# Of the film: its width, px, and how long a frame is shown, ms.
SHOWN, STROKE_MS, LOOK_MS = 800, 80, 1800
# Strokes of the mask, as shares of the editor's picture: a blob left of its middle.
STROKES = [((0.36, 0.42 + 0.03 * row), (0.50, 0.42 + 0.03 * row)) for row in range(6)]


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

    def write(self, path: Path) -> None:
        """All frames, again and again."""
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=self.times, loop=0, quality=70, method=6)


def act(page: Page, url: str) -> Film:
    """Uses the page as a visitor does."""
    film = Film(page)
    page.goto(url)
    canvas = page.locator("canvas").first
    canvas.wait_for()
    page.wait_for_timeout(4000)
    film.take(LOOK_MS)
    box: Any = canvas.bounding_box()
    for (x0, y0), (x1, y1) in STROKES:
        page.mouse.move(box["x"] + x0 * box["width"], box["y"] + y0 * box["height"])
        page.mouse.down()
        for part in range(1, 5):
            share = part / 4
            page.mouse.move(
                box["x"] + (x0 + share * (x1 - x0)) * box["width"], box["y"] + (y0 + share * (y1 - y0)) * box["height"]
            )
            page.wait_for_timeout(100)
            film.take(STROKE_MS)
        page.mouse.up()
    page.wait_for_timeout(3000)
    film.take(LOOK_MS)
    button = page.get_by_role("button", name="Decode")
    button.click()
    film.take(STROKE_MS)
    results = page.locator(".image-frame img")
    results.nth(5).wait_for(timeout=600_000)
    page.wait_for_timeout(2000)
    film.take(LOOK_MS)
    top: Any = page.get_by_role("heading", name="Plain decode").bounding_box()
    for part in range(1, 9):
        page.evaluate(f"window.scrollTo(0, {(top['y'] - 20) * part / 8})")
        film.take(STROKE_MS)
    film.take(2 * LOOK_MS)
    return film


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--plain", required=True)
    parser.add_argument("--out", required=True, type=Path, help="the film, *.webp")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = ["--checkpoint", options.checkpoint, "--plain", options.plain, "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "asymvq_jax", "page", *names], stdout=subprocess.PIPE, text=True,
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
    print(f"{options.out}: {len(film.frames)} frames, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
