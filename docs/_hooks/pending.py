"""Pages that are being written. This file goes when the last of them is there."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PENDING = {"overhead.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Let links to them resolve."""
    for uri in sorted(PENDING):
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content="This page is being written.\n"))
    return files
