"""Extension of griffe: equations of docstrings, written for Sphinx, become blocks of LaTeX on the site."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension

BLOCK = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:\1[ ]+.*\n|[ ]*\n)*)", re.MULTILINE)


class Equations(Extension):
    """Rewrites `.. math::` and `:math:` in every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring with its equations as fenced blocks."""

    def fenced(match: re.Match[str]) -> str:
        indent, first, rest = match.groups()
        body = "\n".join(part for part in (first, textwrap.dedent(rest).strip("\n")) if part)
        return textwrap.indent(f"```latex\n{body}\n```\n\n", indent)

    return BLOCK.sub(fenced, text + "\n").rstrip("\n").replace(":math:`", "`")
