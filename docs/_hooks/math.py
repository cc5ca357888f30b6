"""TeX in the pages becomes MathML when the site is built: no script, no request.

`pymdownx.arithmatex` finds the formulas; math-core translates them and raises on what it does not
know, so a broken formula breaks the build. Browsers set MathML with an OpenType math font; few
systems have one, so the site serves the part of STIX Two Math (SIL Open Font License) that it uses.
"""

from __future__ import annotations

import html
import importlib.metadata
import io
import re

from fontTools import subset
from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FORMULA = re.compile(
    r"<(?P<tag>span|div) class=\"arithmatex\">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>", re.S
)
_CONVERTER = LatexToMathML()
_CHARACTERS = [
    range(0x20, 0x7F),  # ASCII
    range(0xA0, 0x100),
    range(0x300, 0x308),  # accents
    range(0x391, 0x3F6),  # Greek
    range(0x2010, 0x2040),
    range(0x2061, 0x2065),
    range(0x2190, 0x21D5),  # arrows
    range(0x2200, 0x22FF),  # operators
    range(0x1D434, 0x1D468),  # italic letters, which browsers put in place of <mi>x</mi>
    range(0x1D6E2, 0x1D71C),  # italic Greek
    [0x210E, 0x1D53C, 0x1D4A9],  # italic h, blackboard E, calligraphic N
]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the font."""
    files.append(File.generated(config, "assets/math.woff", content=_font()))
    return files


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Translate the formulas of a page."""

    def mathml(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        block = match["tag"] == "div"
        try:
            formula = _CONVERTER.convert_with_local_state(tex, displaystyle=block)
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: cannot set {tex!r}: {error}") from error
        return f'<div class="math-block">{formula}</div>' if block else formula

    return _FORMULA.sub(mathml, content)


def _font() -> bytes:
    options = subset.Options(flavor="woff", layout_features=["ssty"], name_IDs=["*"])
    # The package is needed for this file alone and is not imported.
    package = importlib.metadata.distribution("ziamath")
    path = package.locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")
    font = subset.load_font(str(path), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[point for points in _CHARACTERS for point in points])
    subsetter.subset(font)
    buffer = io.BytesIO()
    subset.save_font(font, buffer, options)
    return buffer.getvalue()
