"""Hooks of mkdocs: pages link to files elsewhere in the repository, which become files of the site."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

from pretraining.config import PretrainConfig, flag

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#\s]+)")
"""A link out of docs/, and its target below the root of the repository."""


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to, under `repository/`."""
    targets: set[str] = set()
    for page in Path(config.docs_dir).glob("*.md"):
        targets.update(OUTSIDE.findall(page.read_text(encoding="utf-8")))
    for target in sorted(targets):
        if (ROOT / target).is_file():
            added = File.generated(config, f"repository/{target}", abs_src_path=str(ROOT / target))
            added.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let these links lead there; links of an added page to files that are not in the site become text."""
    markdown = markdown.replace("<!-- options -->", options_table())
    if page.file.src_uri.startswith("repository/"):
        return re.sub(r"!?\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", markdown)
    return OUTSIDE.sub(r"](repository/\1", markdown)


def options_table() -> str:
    """All fields of `PretrainConfig` with flag, default and meaning."""
    lines = ["| field | flag | default | meaning |", "| --- | --- | --- | --- |"]
    for item in fields(PretrainConfig):
        default = f"`{item.default}`".replace("|", "\\|")
        meaning = item.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{item.name}` | `{flag(item.name)}` | {default} | {meaning} |")
    return "\n".join(lines)
