"""What pyproject.toml cannot say: the README as a package index shows it, away from the repository.

There a link to a file of the repository leads nowhere, so its text is kept and the link is not; a
picture goes whole. Everything else is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

ELSEWHERE = r"\((?!https?://)[^)\s]+\)"


def for_an_index(readme: str) -> str:
    """Return a README without links to its own repository."""
    readme = re.sub(rf"!\[[^\]]*\]{ELSEWHERE}\n*", "", readme)
    return re.sub(rf"\[([^\]]*)\]{ELSEWHERE}", r"\1", readme)


setup(
    long_description=for_an_index(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
