"""Settings whose name says all of them."""

from __future__ import annotations

from typing import ClassVar


class Named:
    """Settings whose name says all of them.

    Attributes:
        label: The name's pattern; it can be a folder.
        heading: The pattern of the name in tables.
    """

    label: ClassVar[str]
    heading: ClassVar[str]

    @property
    def name(self) -> str:
        """A name that says all the settings and can be a folder."""
        return self.label.format(**vars(self))

    @property
    def title(self) -> str:
        """The name in tables."""
        return self.heading.format(**vars(self))
