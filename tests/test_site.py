"""The built site, seen by a browser: nothing fails to load, nothing is left unrendered."""

import html
import io
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s2dm_loss import NoiseSchedule, gain
from s2dm_loss.coefficients import coefficients
from tests.helpers.commands import ROOT, run
from tests.test_docs_blocks import COLUMNS, columns_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PHONE, DESKTOP = 390, 1280

for needed in ("material", "mkdocstrings", "playwright"):
    pytest.importorskip(needed)
pytestmark = [
    pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="no pages beside these tests"),
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}"),
    pytest.mark.xdist_group("site"),  # one build and one browser for all of them
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; any warning fails the build."""
    target = tmp_path_factory.mktemp("site")
    build = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target)
    run(*build, NO_MKDOCS_2_WARNING="1")
    return target


@pytest.fixture(scope="module")
def address(site):
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as api, api.chromium.launch(executable_path=BROWSER) as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    with watched_page(browser, address) as page:
        yield page


@contextmanager
def watched_page(browser, address, scheme="light"):
    """An empty page that remembers what went wrong in it."""
    context = browser.new_context(viewport={"width": DESKTOP, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)  # milliseconds, on a busy machine
    page.trouble = []
    ours = (address, "data:", "blob:")
    for event, fault_of in {
        "console": lambda message: f"console: {message.text}",
        "pageerror": lambda error: f"error: {error}",
        "requestfailed": lambda request: f"failed: {request.url}",
        "request": lambda it: f"leaves the site: {it.url}" if not it.url.startswith(ours) else "",
        "response": lambda it: f"{it.status}: {it.url}" if it.status >= 400 else "",
    }.items():
        page.on(event, lambda what, fault_of=fault_of: page.trouble.append(fault_of(what)))
    yield page
    context.close()


BLOCK_OF_CODE = re.compile(
    r'<div class="([^"]*\bhighlight)">(?:(?!<div).)*?<pre[^>]*>(.*?)</pre>', re.S
)
TEXT_OUTSIDE_CODE = """
() => {
  const article = document.querySelector("article").cloneNode(true);
  article.querySelectorAll("code, pre, script, style, math, svg").forEach((node) => node.remove());
  return article.textContent;
}
"""
BROKEN_PICTURES = """
() => [...document.images].filter((image) => image.complete && !image.naturalWidth)
                          .map((image) => image.src)
"""
# What scrolls sideways shows it by a shadow at the edge, which is a background.
CUT_OFF_UNMARKED = """
() => [...document.querySelectorAll("article *")].filter((node) => {
  const style = getComputedStyle(node);
  return node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0
    && ["auto", "scroll", "hidden"].includes(style.overflowX)
    && style.backgroundImage === "none" && !node.closest("math, svg, .math-block");
}).map((node) => `${node.tagName} ${node.className} ${node.textContent.trim().slice(0, 40)}`)
"""
# Letters on their ground, by the formula of WCAG 2; 3 is what it asks of large letters.
FAINT_TEXT = """
() => {
  const parsed = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], ground) =>
    [r, g, b].map((value, i) => a * value + (1 - a) * ground[i]);
  const luminance = (color) => color
    .map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => node === null ? [255, 255, 255]
    : over(parsed(getComputedStyle(node).backgroundColor), ground(node.parentElement));
  const found = new Set();
  const texts = document.createTreeWalker(document.querySelector("article"), 4);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement, style = getComputedStyle(node);
    if (!texts.currentNode.data.trim() || node.closest("script, style, .headerlink")
        || !node.getClientRects().length) continue;
    const color = node.closest("svg") ? style.fill : style.color, below = ground(node);
    const [dark, bright] = [luminance(over(parsed(color), below)), luminance(below)]
      .sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5))
      found.add(`${contrast.toFixed(1)} ${node.tagName}.${node.className} ${color}`);
  }
  return [...found];
}
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_loads_whole_and_fits_its_window(site, address, browser, scheme):
    """One test for all pages: what is listed on failure is what has to be mended."""
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    faults = []
    with watched_page(browser, address, scheme) as page:
        for name in names:
            faults += [f"{name}: {fault}" for fault in faults_of(page, f"{address}/{name}")]
    assert not faults, "\n".join(faults)


def faults_of(page, url):
    page.trouble.clear()
    page.set_viewport_size({"width": DESKTOP, "height": 900})
    page.goto(url, wait_until="load")
    text = page.evaluate(TEXT_OUTSIDE_CODE)
    found = list(filter(None, page.trouble))
    found += [f"unrendered math: {left!r}" for left in re.findall(r".{0,30}[$\\].{0,30}", text)]
    found += [f"a plot that was not drawn: {left}" for left in re.findall(r"plot: \w+", text)]
    found += [f"a line may end in {left!r}" for left in re.findall(r"\b[kTτλ] = \d+", text)]
    found += [f"picture: {url}" for url in page.evaluate(BROKEN_PICTURES)]
    found += [f"faint: {text}" for text in page.evaluate(FAINT_TEXT)]
    found += ["MathML error"] * page.locator("merror").count()
    for width in (DESKTOP, PHONE):
        page.set_viewport_size({"width": width, "height": 900})
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            found.append(f"{wide} px wide in a window of {width}")
        found += [f"cut off at {width}: {it}" for it in page.evaluate(CUT_OFF_UNMARKED)]
    return found


def test_blocks_show_no_doctest_directives_and_fit_80_columns(site):
    """But diffs, which have the lines of a trainer's file to the letter."""
    faults, seen = [], 0
    for path in sorted(site.rglob("*.html")):
        page = path.read_text(encoding="utf-8")
        if "|:--" in page:
            faults.append(f"{path.relative_to(site)}: a table that is none")
        for kind, block in BLOCK_OF_CODE.findall(page):
            seen += 1
            for line in html.unescape(re.sub(r"<[^>]+>", "", block)).splitlines():
                wide = "language-diff" not in kind and columns_of(line) > COLUMNS
                if wide or "# doctest:" in line:
                    faults.append(f"{path.relative_to(site)}: {line}")
    assert seen
    assert not faults, "\n".join(faults)


def test_math_is_set_in_the_font_of_the_site(address, page):
    page.goto(f"{address}/the_loss.html")
    page.evaluate("document.fonts.ready")
    assert page.evaluate("[...document.fonts].map((font) => font.status)") == ["loaded"]
    # A root over a fraction is as high as the fraction: only a math font has one that grows.
    assert page.locator("math msqrt").first.bounding_box()["height"] > 10


# The colour of a plot's letters, which are text or outlines, and of the text around it.
COLOURS_OF_PLOTS = """
() => [...document.querySelectorAll("figure.plot svg")].map((svg) => [
  getComputedStyle(svg.querySelector("text, g[id^=text_] g")).fill,
  getComputedStyle(svg.closest("article")).color,
])
"""
# The sizes of their letters on the screen, in pixels.
LETTERS_OF_PLOTS = """
() => [...document.querySelectorAll("figure.plot svg")].flatMap((svg) => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const outlines = [...svg.innerHTML.matchAll(/scale\\(([\\d.]+) -/g)].map((it) => 100 * it[1]);
  const texts = [...svg.querySelectorAll("text")].map((it) =>
    parseFloat(getComputedStyle(it).fontSize));
  return [...outlines, ...texts].map((size) => size * scale);
})
"""


@pytest.mark.parametrize("name", ["index", "correct", "evidence", "overhead", "the_loss"])
def test_plots_stand_in_the_page(address, browser, name):
    colours = set()
    for scheme in ("light", "dark"):
        with watched_page(browser, address, scheme) as page:
            page.set_viewport_size({"width": PHONE, "height": 900})
            page.goto(f"{address}/{name}.html")
            assert page.locator("article img[src$='.svg']").count() == 0
            found = page.evaluate(COLOURS_OF_PLOTS)
            assert found
            assert all(letters == around for letters, around in found)
            colours.update(letters for letters, _ in found)
            # Where the plot has no ink there is the page, not a slab of its own.
            grounds = "[style*='fill: #ffffff'], [style*='fill: white']"
            assert page.locator(f"figure.plot svg :is({grounds})").count() == 0
            assert min(page.evaluate(LETTERS_OF_PLOTS)) > 8
    assert len(colours) == 2


def test_a_hat_in_code_is_on_its_letter_and_in_one_cell(address, page):
    from PIL import Image

    page.goto(f"{address}/correct.html")
    page.evaluate("document.fonts.ready")
    hat = page.locator("pre .hat").first
    assert hat.inner_text() == "ε̂"
    hat.scroll_into_view_if_needed()
    box = hat.bounding_box()
    letter = hat.evaluate(
        """(hat) => {
          const probe = hat.parentElement.appendChild(document.createElement("span"));
          probe.textContent = "0".repeat(10);
          return probe.getBoundingClientRect().width / 10;
        }"""
    )
    assert box["width"] == pytest.approx(letter, abs=0.5)

    def ink(cell):
        clip = {**box, "x": box["x"] + cell * letter + 1, "width": letter - 2}
        image = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("L")
        low, high = image.getextrema()
        return high - low

    # "ε̂ in place of ε̂": the cell behind the first is empty, the hat's own is not.
    assert ink(0) > 60
    assert ink(1) < 5


@pytest.mark.parametrize(
    ("name", "k", "tau"),
    [("linear", 1, 0.99), ("linear", 49, 0.95), ("scaled linear", 49, 0.99), ("cosine", 120, 0.95)],
)
def test_the_explorer_computes_what_the_library_does(address, page, name, k, tau):
    schedule = getattr(NoiseSchedule, name.replace(" ", "_"))(1000)
    table, s = coefficients(schedule, k, tau=tau), gain(schedule, k, tau=tau)
    page.goto(f"{address}/the_loss.html")
    page.select_option("#explorer select", name)
    page.fill("#explorer input[name=k]", str(k))
    page.fill("#explorer input[name=tau]", str(tau))
    shown = re.findall(r"\d+\.\d+", page.inner_text("#explorer .readout"))
    expected = (s[899], s.min(), (1 / s).max(), table.weight.max(), table.c.max())
    assert shown == [f"{float(value):.4f}" for value in expected]


def test_search_finds_a_page(address, page):
    page.goto(f"{address}/index.html")
    page.wait_for_function("window.component$ !== undefined")  # the theme's script is at work
    page.click(".md-search__input")
    page.locator(".md-search__input").press_sequentially("zero terminal SNR", delay=20)
    # It raises where none appears.
    page.wait_for_selector(".md-search-result__link[href*='schedules.html']", state="attached")
    assert not any(page.trouble)
