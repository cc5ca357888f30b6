"""Pages that are being written. This file goes when the last of them is there."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PENDING = {
    "adapters/guided_diffusion.md",
    "adapters/diffusers.md",
    "adapters/score_sde.md",
    "adapters/ddim.md",
    "adapters/write_your_own.md",
    "which_gain.md",
    "evidence.md",
    "overhead.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Let links to them resolve."""
    for uri in sorted(PENDING):
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content="This page is being written.\n"))
    return files
