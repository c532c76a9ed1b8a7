"""The tasks with results, and what the configs of their studies say about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import report
from .layout import read_json
from .targets import PLAIN


@dataclass(frozen=True)
class Told:
    """What the config of a study says about its tables.

    Attributes:
        comment: Text.
        conclusion: Text, or nothing.
        arms: Their order.
        baseline: Arm that the others are compared with.
        notes: Conclusions, by arm.
        earlier: Arms whose results are of an earlier form of their trainer.
    """

    comment: str
    conclusion: str
    arms: tuple[str, ...]
    baseline: str
    notes: Mapping[str, str]
    earlier: frozenset[str]


def told(study: str) -> Told:
    """Read the committed config of a study; of another one nothing is known."""
    content = read_json(Path(__file__).with_name(f"{study}.json")) or {}
    arms = content.get("arms", {})
    notes = {name: arm["note"] for name, arm in arms.items() if "note" in arm}
    texts = content.get("comment", ""), content.get("conclusion", "")
    earlier = frozenset(name for name, arm in arms.items() if arm.get("earlier"))
    return Told(*texts, tuple(arms), content.get("baseline", PLAIN), notes, earlier)


class Found(NamedTuple):
    """A task with results.

    Attributes:
        folder: Of its results.
        told: What the config of its study says.
        results: On its test patients, or on those for validation as long as the test was not used.
    """

    folder: Path
    told: Told
    results: report.Results

    @property
    def data(self) -> str:
        """Dataset and configuration."""
        task = self.results.runs[0]["setting"]["task"]
        return f"{task['data'].partition('_')[2]} `{task['configuration']}`"

    @property
    def patients(self) -> int:
        """How many patients were measured."""
        return len(set(self.results.runs[0]["patient_of"].values()))


def found(out: Path) -> list[Found]:
    """All tasks with results, those on test patients before the others, and trials last."""
    tasks = []
    for folder in {file.parents[2] for file in out.glob("*/*/runs/*/*.json")}:
        study = told(folder.parent.name)
        measured = [report.load(folder, on, study.arms, study.baseline) for on in ("test", "validation")]
        results = measured[0] or measured[1]
        assert results is not None, "a folder of results has runs"
        tasks.append(Found(folder, study, results))
    return sorted(tasks, key=lambda task: (task.told.baseline != PLAIN, task.results.on != "test", task.folder))
