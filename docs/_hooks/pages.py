"""Pages that live at the top of the repository, and links that leave `docs/`.

CHANGELOG.md and CONTRIBUTING.md are read by people in the repository and are pages of
the site as well: one source, links rewritten. A link to a page goes to that page; a picture from
elsewhere in the repository is brought along; a link to any other file of the repository loses its
link and keeps its text, since the site does not carry the file.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
PICTURES = {".gif", ".jpg", ".png", ".svg", ".webp"}

_CODE = re.compile(r"(^ *(?P<fence>```+|~~~+).*?^ *(?P=fence) *$|`[^`\n]+`)", re.M | re.S)
_LINK = re.compile(
    r"(?P<open>!?\[(?P<text>[^\]]*)\]\()(?P<url>[^)\s]+)(?P<close>(?: \"[^\"]*\")?\))"
)
# Code, and pictures that stand in the page, whose text is taken to the letter.
_ELEMENT = re.compile(r"(<code.*?</code>|<svg.*?</svg>|<[^>]*>)", re.S)
_HTML = re.compile(r"(?P<open>\b(?:src|srcset|href)=\")(?P<url>[^\"]+)(?P<close>\")")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand at the top of the repository."""
    for source, target in ROOT_PAGES.items():
        text = (_root(config) / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a page those of the site."""
    sources = {target: source for source, target in ROOT_PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def site_url(url: str) -> str | None:
        """The same link on the site; None where the site does not carry the file."""
        path, hash_, anchor = url.partition("#")
        if not path or "://" in path or path.startswith(("mailto:", "data:", "/")):
            return url
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in ROOT_PAGES:
            target = ROOT_PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif not (_root(config) / target).exists():
            return url  # mkdocs reports it
        elif Path(target).suffix in PICTURES:
            if files.get_file_from_path(f"assets/{target}") is None:
                picture = _root(config) / target
                files.append(File.generated(config, f"assets/{target}", abs_src_path=str(picture)))
            target = f"assets/{target}"
        else:
            return None
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") + hash_ + anchor

    def link(match: re.Match[str]) -> str:
        url = site_url(match["url"])
        return match["text"] if url is None else match["open"] + url + match["close"]

    def attribute(match: re.Match[str]) -> str:
        url = site_url(match["url"])
        return match[0] if url is None else match["open"] + _page_url(url) + match["close"]

    return _outside_code(markdown, lambda text: _HTML.sub(attribute, _LINK.sub(link, text)))


def on_page_content(content: str, **_: object) -> str:
    """Keep together what is one thing to the eye."""
    parts = _ELEMENT.split(content)
    parts[::2] = map(_unbroken, parts[::2])
    # In a fixed-width font the hat of ε̂ lands beside its letter: two glyphs, two cells.
    parts[1::2] = (part.replace("ε̂", '<span class="hat">ε̂</span>') for part in parts[1::2])
    return "".join(parts)


def _unbroken(text: str) -> str:
    """No line ends inside "k = 9" or "1.2 %", nor between the ends of an interval."""
    text = re.sub(r"(\d) %", r"\1&nbsp;%", text)
    text = re.sub(r"\b([kTτλδσ]) = (?=\S)", r"\1&nbsp;=&nbsp;", text)
    return re.sub(r"(\[[-+][\d.]+), ([-+][\d.]+\])", r"\1,&nbsp;\2", text)


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the text between code blocks and code spans.

    A link whose text is code, [`name`](url), is still a link: code spans inside brackets stay with
    the text around them.
    """
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"\0{len(held) - 1}\0"

    changed = change(_CODE.sub(hold, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: held[int(match[1])], changed)


def _page_url(url: str) -> str:
    """Turn .md into .html, which mkdocs does in Markdown links and not in HTML attributes."""
    return url if "://" in url else re.sub(r"\.md(?=#|$)", ".html", url)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
