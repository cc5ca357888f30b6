"""Figures of the benchmarks, drawn from committed results when the site is built."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import matplotlib as mpl
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_SHOWN = re.compile(r"!\[[^\]]*\]\(assets/(?P<name>[\w/-]+)\.svg\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures that pages show and that are no files."""
    root = Path(config.config_file_path).parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks.pages.figures import STYLE
    from benchmarks.pages.render import find_holes

    _, figures = find_holes()
    texts = [file.content_string for file in files.documentation_pages()]
    for name in dict.fromkeys(name for text in texts for name in _SHOWN.findall(text)):
        path = f"assets/{name}.svg"
        if files.get_file_from_path(path) is None and name in figures:
            buffer = io.StringIO()
            with mpl.rc_context(STYLE):
                figures[name]().savefig(buffer, format="svg", metadata={"Date": None})
            files.append(File.generated(config, path, content=buffer.getvalue()))
    return files
