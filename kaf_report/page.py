"""The page: one self-contained file. Pictures are embedded until the page is full; the rest lie beside it."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.files import replacing

FULL = 9_000_000
"""Bytes of embedded pictures (as text) from which on pictures are linked instead: the page stays under 10 MB."""
REPORT, PICTURES = "report.html", "pictures"
MARK = '<meta name="generator" content="kaf-report">'
"""In every page of ours, so that no other one is replaced."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Attributes:
        source: The picture itself as a data URI; empty if the page is full.
        file: File of the PNG, relative to the page.
        text: What it shows, for those who do not see it.
    """

    source: str
    file: str
    text: str


@dataclass
class Album:
    """Writes PNGs and hands them to the page, in the order of their importance.

    Attributes:
        folder: Folder of the report.
        used: Bytes of the page that pictures take so far.
    """

    folder: Path
    used: int = field(default=0)

    def save(self, name: str, data: bytes) -> str:
        """Write a PNG under a name of ours, never one from a file; returns its path relative to the page.

        Raises:
            KAFError: It cannot be written.
        """
        file = f"{PICTURES}/{name}.png"
        with replacing(self.folder / file, "Choose another folder with -o.") as temporary:
            temporary.write_bytes(data)
        return file

    def embed(self, file: str, text: str) -> Picture:
        """Take a saved PNG into the page if there is room.

        Args:
            file: File from `save`.
            text: What it shows.
        """
        data = (self.folder / file).read_bytes()
        size = 4 * len(data) // 3
        if self.used + size > FULL:
            return Picture("", file, text)
        self.used += size
        return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", file, text)


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill a template; everything is escaped: names of cases and labels come from files that anyone may have made."""
    environment = Environment(
        loader=PackageLoader("kaf_report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    # Only the page's own script may run, and nothing may be loaded from anywhere.
    return environment.get_template(template).render(nonce=secrets.token_urlsafe(16), mark=Markup(MARK), **content)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def write(folder: Path, template: str, content: Mapping[str, Any]) -> Path:
    """Write the page.

    Raises:
        KAFError: It cannot be written.
    """
    page = folder / REPORT
    text = render(template, content)
    with replacing(page, "Choose another folder with -o.") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page


def prepare_folder(folder: Path) -> None:
    """Make the folder of a report with a page that says that it is not finished; remove an earlier one's pictures.

    Raises:
        KAFError: It cannot be made, or is in use for something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found, page = sorted(path.name for path in folder.iterdir()), folder / REPORT
        if found and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")):
            raise KAFError(
                f"-o {folder} holds other files ({found[0]}, ...). Choose a new folder, or that of an earlier report."
            )
        page.write_text(f"<!DOCTYPE html>\n{MARK}\n<p>This report was not finished.</p>\n", encoding="utf-8")
        for old in (folder / PICTURES).glob("*.png"):
            old.unlink()
    except OSError as error:
        raise KAFError(
            f"-o {folder} cannot be written to ({error.strerror or error}). Choose another folder."
        ) from error
