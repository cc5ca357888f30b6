"""Holes of the pages resolve, or say where they do not; the committed pages are up to date."""

import re

import pytest
from matplotlib.figure import Figure

from benchmarks.pages import render
from benchmarks.pages.render import Renderer, find_holes, render_all, sources
from tests.helpers.commands import ROOT


@pytest.fixture
def renderer(tmp_path):
    holes = {"change": lambda run, at=10: f"{run} {at}", "nothing": lambda: None, "four": 4}
    return Renderer(holes, {"room/seeds": Figure}, tmp_path)


def test_holes_are_filled(renderer):
    text = "# Title {#top}\nAbout {{ change('unet', at=20) }} and {{ four }}.\n"
    page = renderer.render("docs/page.md", text + "{% if four > 3 %}\nSo.\n{% endif %}\n")
    assert page.startswith("# Title {#top}\n\n<!-- Written by `python -m benchmarks.pages` from ")
    assert page.endswith("sources/docs/page.md. -->\n\nAbout unet 20 and 4.\nSo.\n")


@pytest.mark.parametrize(
    ("hole", "said"),
    [
        ("chnge('unet')", "'chnge' is undefined"),
        ("four.five", "no attribute 'five'"),
        ("change()", "missing 1 required"),
        ("nothing()", "resolved to None"),
        ("figure('room/none', 'x')", "no figure 'room/none'; there are room/seeds"),
        ("change('unet'", "unexpected '}'"),
    ],
)
def test_a_hole_that_does_not_resolve_names_its_place(renderer, hole, said):
    with pytest.raises(ValueError, match=rf"docs/page.md, line 3: .*{re.escape(said)}"):
        renderer.render("docs/page.md", f"# Title\n\n{{{{ {hole} }}}}\n")


def test_a_figure_is_linked_from_where_its_page_lies(renderer):
    for page, folder in (("docs/a.md", "assets"), ("README.md", "docs/assets")):
        text = renderer.render(page, "# T\n{{ figure('room/seeds', 'Seeds') }}")
        assert text.endswith(f"\n![Seeds]({folder}/room/seeds.svg)\n")
        assert renderer.shown == ["room/seeds"]


def test_two_benchmarks_do_not_share_a_name():
    with pytest.raises(ValueError, match=r"monitor\.holes: .* is another benchmark's name"):
        find_holes(("monitor", "monitor"))


def test_a_page_that_differs_is_named_and_written(tmp_path, monkeypatch):
    of_pages = {"docs/a.md": "# A\n{{ 1 + 1 }}", "docs/b.md": "# B"}
    monkeypatch.setattr(render, "sources", lambda: of_pages)
    monkeypatch.setattr(render, "find_holes", lambda: ({}, {}))
    pages = [tmp_path / "docs/a.md", tmp_path / "docs/b.md"]
    assert render_all(tmp_path, write=False) == pages
    assert not pages[0].exists()
    assert render_all(tmp_path, only=["docs/a.md"]) == pages[:1]
    assert pages[0].read_text().endswith("\n\n2\n")
    assert render_all(tmp_path, write=False) == pages[1:]
    with pytest.raises(ValueError, match=r"no source of docs/c.md"):
        render_all(tmp_path, only=["docs/c.md"])


@pytest.mark.parametrize("page", sources())
def test_the_committed_pages_are_up_to_date(page):
    assert render_all(ROOT, only=[page], write=False) == [], "python -m benchmarks.pages"
