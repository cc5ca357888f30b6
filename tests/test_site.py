"""The built site, seen by a browser: nothing fails to load, nothing is left unrendered."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from s2dm_loss import NoiseSchedule, coefficients, epsilon_scaling

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PHONE, DESKTOP = 390, 1280
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",  # it refuses to start as root, as in many a container
]


def missing() -> str | None:
    if not (ROOT / "mkdocs.yml").is_file():
        return "the pages are not beside these tests"
    for module in ("material", "mkdocstrings", "playwright"):
        if importlib.util.find_spec(module) is None:
            return f"the package {module!r} is not installed"
    return None if BROWSER else f"no browser is installed: none of {', '.join(BROWSERS)}"


pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.xdist_group("site"),  # one build and one browser for all of them
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site; any warning fails the build."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(  # noqa: S603 - our own command
        command,
        cwd=ROOT,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout
    return target


class Quiet(SimpleHTTPRequestHandler):
    """A file server that keeps its log to itself."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """An empty page that remembers what went wrong in it."""
    context = browser.new_context(viewport={"width": DESKTOP, "height": 900})
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: page.trouble.append(f"error: {error}"))
    page.on("requestfailed", lambda request: page.trouble.append(f"failed: {request.url}"))
    page.on("request", lambda request: _note_elsewhere(page, request.url, address))
    page.on("response", lambda reply: _note_status(page, reply))
    yield page
    context.close()


def _note_elsewhere(page, url: str, address: str) -> None:
    if not url.startswith((address, "data:", "blob:")):
        page.trouble.append(f"a request leaves the site: {url}")


def _note_status(page, reply) -> None:
    if reply.status >= 400:
        page.trouble.append(f"{reply.status}: {reply.url}")


TEXT_OUTSIDE_CODE = """
() => {
  const article = document.querySelector("article").cloneNode(true);
  article.querySelectorAll("code, pre, script, style, math").forEach((node) => node.remove());
  return article.textContent;
}
"""
BROKEN_PICTURES = """
() => [...document.images].filter((image) => image.complete && !image.naturalWidth)
                          .map((image) => image.src)
"""


def test_every_page_loads_whole_and_fits_its_window(site, address, page):
    """One test for all pages: what is listed on failure is what has to be mended."""
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    assert len(names) > 15
    faults = []
    for name in names:
        page.trouble.clear()
        page.set_viewport_size({"width": DESKTOP, "height": 900})
        page.goto(f"{address}/{name}", wait_until="load")
        text = page.evaluate(TEXT_OUTSIDE_CODE)
        found = list(page.trouble)
        found += [f"unrendered math: {left!r}" for left in re.findall(r".{0,30}[$\\].{0,30}", text)]
        found += [f"a plot that was not drawn: {left}" for left in re.findall(r"plot: \w+", text)]
        found += [f"picture: {url}" for url in page.evaluate(BROKEN_PICTURES)]
        if page.locator("merror").count():
            found.append("MathML error")
        for width in (DESKTOP, PHONE):
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                found.append(f"{wide} px wide in a window of {width}")
        faults += [f"{name}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def test_math_is_set_in_the_font_of_the_site(address, page):
    page.goto(f"{address}/the_loss.html")
    page.evaluate("document.fonts.ready")
    assert page.locator("math").count() > 40
    assert page.evaluate("[...document.fonts].map((font) => [font.family, font.status])") == [
        ["Site Math", "loaded"]
    ]
    # A root over a fraction is as high as the fraction: only a math font has one that grows.
    root = page.locator("math msqrt").first
    assert root.bounding_box()["height"] > 10


def test_plots_take_the_colour_of_the_text(address, browser):
    fill = "getComputedStyle(document.querySelector('figure.plot text')).fill"
    colours = set()
    for scheme, palette in (("light", "default"), ("dark", "slate")):
        # A context each: a page remembers the palette it was last shown in.
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{address}/the_loss.html")
        page.wait_for_selector(f"body[data-md-color-scheme={palette}]")
        assert page.locator("figure.plot svg").count() == 3
        colours.add(page.evaluate(fill))
        context.close()
    assert len(colours) == 2


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("linear", NoiseSchedule.linear(1000)),
        ("scaled linear", NoiseSchedule.scaled_linear(1000)),
        ("cosine", NoiseSchedule.cosine(1000)),
    ],
)
@pytest.mark.parametrize(("k", "tau"), [(1, 0.99), (49, 0.99), (120, 0.95)])
def test_the_explorer_computes_what_the_library_does(address, page, name, schedule, k, tau):
    page.goto(f"{address}/the_loss.html")
    page.select_option("#explorer select", name)
    page.fill("#explorer input[name=k]", str(k))
    page.fill("#explorer input[name=tau]", str(tau))
    shown = re.findall(r"\d+\.\d+", page.inner_text("#explorer .readout"))
    table = coefficients(schedule, k, tau=tau)
    expected = (epsilon_scaling(schedule, k, tau=tau), table.weight, table.c)
    assert shown == [f"{float(values.max()):.4f}" for values in expected]


def test_search_finds_a_page(address, page):
    page.goto(f"{address}/index.html")
    page.wait_for_function("window.component$ !== undefined")  # the theme's script is at work
    page.click(".md-search__input")
    page.locator(".md-search__input").press_sequentially("zero terminal SNR", delay=20)
    # It raises where none appears.
    page.wait_for_selector(".md-search-result__link[href*='schedules.html']", state="attached")
    assert not page.trouble
