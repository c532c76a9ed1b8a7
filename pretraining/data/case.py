"""What names an image: its source and its name in there."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """One image of the first dataset or of a further source.

    Files, logs and checkpoints name it by its `identifier`; nothing else takes that apart.

    Attributes:
        source: Key of the further source; empty for the first dataset.
        name: Unique within its source; no slash in it.
    """

    source: str
    name: str

    @classmethod
    def of(cls, identifier: str) -> Case:
        """The case of an identifier."""
        source, _, name = identifier.rpartition("/")
        return cls(source, name)

    @property
    def is_own(self) -> bool:
        """Whether it belongs to the first dataset."""
        return not self.source

    @property
    def identifier(self) -> str:
        """`<name>` in the first dataset, `<source>/<name>` elsewhere: unique over all sources."""
        return self.name if self.is_own else f"{self.source}/{self.name}"
