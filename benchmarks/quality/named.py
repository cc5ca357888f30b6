"""Settings whose name says all of them."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

SYMBOLS = {"tau": "τ", "strength": "λ"}


class Named:
    """Settings whose name says all of them.

    Attributes:
        label: The name's pattern; it can be a folder.
        heading: The pattern of the name in tables.
        ours: Whether it is what this library is about, and not a peer.
    """

    label: ClassVar[str]
    heading: ClassVar[str]
    ours: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """A name that says all the settings and can be a folder."""
        return self._filled(self.label, "-{0}{2:g}")

    @property
    def title(self) -> str:
        """The name in tables."""
        return self._filled(self.heading, ", {1} = {2:g}")

    def _filled(self, pattern: str, addition: str) -> str:
        """Fill a pattern in, and add what it does not name where that is not the default."""
        text = pattern.format(**vars(self))
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if f"{{{field.name}" not in pattern and value != field.default:
                text += addition.format(field.name, SYMBOLS.get(field.name, field.name), value)
        return text
