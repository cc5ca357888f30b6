"""A source becomes a page: Jinja2, where a hole that does not resolve is an error."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from matplotlib.figure import Figure

from benchmarks.files import write_text
from benchmarks.pages.figures import save_figure

SOURCES = Path(__file__).parent / "sources"
ROOMS = ("quality", "overhead", "lab", "monitor")
ASSETS = Path("docs/assets")
Draw = Callable[[], Figure]
COMMITTED = frozenset({"README.md"})
"""Pages that are read where no build draws their figures; these figures are files."""


def find_holes(rooms: Iterable[str] = ROOMS) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the holes and the figures of all benchmarks, by name.

    Raises:
        ValueError: If two benchmarks use one name.
    """
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for room in rooms:
        name = f"benchmarks.{room}.holes"
        module = importlib.import_module(name)
        for known, new in zip(found, (module.HOLES, module.FIGURES), strict=True):
            if twice := known.keys() & new.keys():
                raise ValueError(f"{name}: {', '.join(sorted(twice))} is another benchmark's name")
            known.update(new)
    return found


def sources(root: Path = SOURCES) -> dict[str, str]:
    """Return the text of each source by the path of its page in the repository."""
    paths = sorted(root.rglob("*.md"))
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


class Renderer:
    """Fills holes: what a source can name, and what its hole `figure(name, alt)` can draw."""

    def __init__(
        self, holes: Mapping[str, Any], figures: Mapping[str, Draw], root: Path = SOURCES
    ) -> None:
        """Set Jinja2 up, for sources that may include others in `root`."""
        self.figures = figures
        self.shown: list[str] = []
        self.page = ""
        self.environment = Environment(  # noqa: S701 - the pages are Markdown, not HTML
            loader=FileSystemLoader(root),
            undefined=StrictUndefined,
            finalize=_filled,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            # A heading's anchor in Markdown, {#name}, is no comment.
            comment_start_string="<!--#",
            comment_end_string="#-->",
        )
        self.environment.globals.update(holes, figure=self.figure)

    def figure(self, name: str, alt: str) -> str:
        """Return the line that shows a figure."""
        if name not in self.figures:
            raise ValueError(f"no figure {name!r}; there are {', '.join(sorted(self.figures))}")
        self.shown.append(name)
        folder = Path(*ASSETS.parts[self.page.count("/") :])
        return f"![{alt}]({(folder / name).as_posix()}.svg)"

    def render(self, page: str, text: str) -> str:
        """Return a page from its source, with a note of where that lies.

        Raises:
            ValueError: If a hole does not resolve; it names the page and the line.
        """
        self.page, self.shown = page, []
        try:
            body = self.environment.from_string(text).render()
        except (TemplateError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno or 0 for frame in frames if frame.filename == "<template>"]
            line = getattr(error, "lineno", None) or max(lines, default=0)
            raise ValueError(f"{page}, line {line}: {type(error).__name__}: {error}") from error
        heading, _, rest = body.partition("\n")
        source = f"benchmarks/pages/sources/{page}"
        note = f"<!-- Written by `python -m benchmarks.pages` from {source}. -->"
        return f"{heading}\n\n{note}\n\n{rest.strip()}\n"


def render_all(root: Path, only: Iterable[str] = (), *, write: bool = True) -> list[Path]:
    """Fill the holes of a repository's pages, all or those in `only`; return those that change.

    Raises:
        ValueError: If a hole does not resolve, or there is no source of a page in `only`.
    """
    wanted, known = set(only), sources()
    if unknown := wanted - known.keys():
        raise ValueError(f"pages: no source of {', '.join(sorted(unknown))}; {', '.join(known)}")
    renderer = Renderer(*find_holes())
    changed = []
    for page, text in known.items():
        if wanted and page not in wanted:
            continue
        filled, path = renderer.render(page, text), root / page
        if not path.is_file() or path.read_text(encoding="utf-8") != filled:
            changed.append(path)
            if write:
                write_text(path, filled)
        if write and page in COMMITTED:
            for name in renderer.shown:
                save_figure(renderer.figures[name], root / ASSETS / f"{name}.svg")
    return changed


def _filled(value: object) -> object:
    """Refuse a hole that says nothing."""
    if value is None:
        raise ValueError("a hole resolved to None: nothing was measured there")
    return value
