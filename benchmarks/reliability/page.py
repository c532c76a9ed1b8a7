"""docs/reliability.md from the figures of `fuzz` and `faults`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reliability"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
HEADER = """# Reliability

Written by `PYTHONPATH=benchmarks python -m reliability.page` from `benchmarks/results/reliability/`.

Two things are tried beside the tests. `make fuzz` (ten minutes; `MINUTES=60` for an hour) makes random wrong files of
every kind that is read, and looks for anything but this package's own error. `make faults` kills and starves runs, and
compares what comes out with runs that nothing has happened to. A short form of both is part of `make test`.
"""


def page(results: Path) -> str:
    """The page of the figures in a folder."""
    return "\n".join([HEADER, _fuzz(_read(results / "fuzz.json")), _faults(_read(results / "faults.json"))])


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _fuzz(found: dict[str, Any]) -> str:
    lines = ["## Wrong files", ""]
    if not found:
        return "\n".join([*lines, "Not measured yet.", ""])
    kinds = ("refused", "accepted", "failed")
    rows = []
    for name, counts in found["readers"].items():
        rows.append([name, str(sum(counts.values())), *(str(counts.get(kind, 0)) for kind in kinds)])
    total = sum(sum(counts.values()) for counts in found["readers"].values())
    lines += [
        f"{total} wrong files in {found['minutes']:g} minutes on {_machine(found)}, seeds from {found['first_seed']}: "
        f"{len(found['failures'])} failure(s). *Refused*: one line that names the file; *accepted*: what was changed "
        "is not used, or allowed.",
        "",
        markdown(["file", "tried", "refused", "accepted", "failed"], rows),
        "",
    ]
    lines += [f"- {f['reader']}, seed {f['seed']}: {f['error']}" for f in found["failures"]]
    return "\n".join(lines)


def _faults(found: dict[str, Any]) -> str:
    lines = ["## Faults in the middle of runs", ""]
    if not found:
        return "\n".join([*lines, "Not measured yet.", ""])
    rows = [[fault["what"], str(fault["tries"]), str(fault["passed"])] for fault in found["faults"].values()]
    lines += [f"On {_machine(found)}.", "", markdown(["fault", "tried", "passed"], rows), ""]
    lines += [f"- {fault['what']}: {text}" for fault in found["faults"].values() for text in fault["failures"]]
    return "\n".join(lines)


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cores']} cores ({machine['processor']}), torch {found['versions']['torch']}"


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS), encoding="utf-8")
