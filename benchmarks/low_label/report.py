"""Tables of a task: Dice and distance by arm and number of labelled patients, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown

from nnunetv2_kaf.errors import KAFError

from . import stats
from .config import ALL
from .layout import read_json

SEED = 0
ENOUGH_DRAWS = 5
"""The bootstrap interval of fewer draws is too short."""
METRICS = {"dice": ("Dice", "{:.4f}", "{:+.4f}"), "hd95": ("HD95 (mm)", "{:.2f}", "{:+.2f}")}


@dataclass(frozen=True)
class Cell:
    """One arm with one number of labelled patients.

    Attributes:
        arm: Its name.
        labelled: Number of patients, or "all".
        draws: Number of draws.
        metrics: Mean over patients, by metric.
        spread: Smallest and largest mean of a draw, by metric.
        differences: Differences to the baseline with the same number of labelled patients, by metric; none for the
            baseline.
        cost: Means over the draws; None where a part is unknown.
    """

    arm: str
    labelled: int | str
    draws: int
    metrics: Mapping[str, stats.Mean]
    spread: Mapping[str, tuple[float, float]]
    differences: Mapping[str, stats.Difference]
    cost: Mapping[str, float | None]

    @property
    def clear(self) -> bool:
        """Whether the Dice differs clearly from the baseline's: by its interval, of enough draws."""
        mean = self.differences["dice"].mean
        return self.draws >= ENOUGH_DRAWS and (mean.low > 0 or mean.high < 0)


@dataclass(frozen=True)
class Results:
    """Runs of one task of one study, on validation or test patients."""

    study: str
    task: str
    on: str
    runs: tuple[Mapping[str, Any], ...]
    baseline: str

    def cells(self) -> list[Cell]:
        """The rows of the table, by number of labelled patients, the baseline first."""
        groups: dict[tuple[int | str, str], list[Mapping[str, Any]]] = {}
        for run in self.runs:
            groups.setdefault((run["labelled"], run["arm"]), []).append(run)
        order = sorted(groups, key=lambda key: (key[0] == ALL, 0 if key[0] == ALL else key[0], key[1] != self.baseline))
        return [_cell(groups[key], groups.get((key[0], self.baseline))) for key in order]


def load(folder: Path, on: str, arms: Sequence[str] = (), baseline: str = "plain") -> Results | None:
    """Read the runs of a task.

    Args:
        folder: Results of the task.
        on: "validation" or "test".
        arms: Order of the arms; others follow.
        baseline: Arm that the others are compared with.

    Returns:
        None if there are none.

    Raises:
        KAFError: Runs of different settings or splits lie in the folder.
    """
    runs: list[Any] = [read_json(file) for file in sorted((folder / "runs" / on).glob("*.json"))]
    if not runs:
        return None
    for key in ("study", "task", "split_sha256", "setting_sha256"):
        found = {run[key]: f"{run['arm']}_M{run['labelled']}_draw{run['draw']}.json" for run in runs}
        if len(found) > 1:
            raise KAFError(
                f"{folder / 'runs' / on}: found different values of {key} in {', '.join(found.values())}; numbers of "
                "different settings never share a table. Move the files of one of them away."
            )
    order = {name: i for i, name in enumerate(arms)}
    runs.sort(key=lambda run: (order.get(run["arm"], len(order)), run["draw"]))
    return Results(runs[0]["study"], runs[0]["task"], on, tuple(runs), baseline)


def _cell(runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] | None) -> Cell:
    rng = np.random.default_rng(SEED)
    metrics, spread, differences = {}, {}, {}
    for metric in METRICS:
        values = stats.collect(runs, metric)
        if not values.patients:
            continue
        metrics[metric] = stats.mean(values.array, rng)
        means = np.nanmean(values.array, 1)
        spread[metric] = (float(means.min()), float(means.max()))
        if baseline is not None and runs[0]["arm"] != baseline[0]["arm"]:
            found = stats.difference(values, stats.collect(baseline, metric), rng)
            if found is not None:
                differences[metric] = found
    cost = {key: _average([run["cost"][key] for run in runs]) for key in runs[0]["cost"]}
    return Cell(runs[0]["arm"], runs[0]["labelled"], len(runs), metrics, spread, differences, cost)


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def table(cells: Sequence[Cell], baseline: str) -> str:
    """Markdown table of all numbers."""
    header = ["labelled patients", "arm", "draws"]
    for title, _, _ in METRICS.values():
        header += [title, "draws from, to", f"{title}, difference to {baseline}", "p"]
    header += ["training s", "pretraining s"]
    rows = []
    for cell in cells:
        row = [str(cell.labelled), f"`{cell.arm}`", str(cell.draws)]
        for metric, (_, plain, signed) in METRICS.items():
            row += _metric(cell, metric, plain, signed)
        rows.append([*row, _seconds(cell.cost["training_seconds"]), _seconds(cell.cost["pretraining_seconds"])])
    return markdown(header, rows)


def trials(results: Results, notes: Mapping[str, str]) -> str:
    """Markdown table of trials: one line for each, with what it changes in the baseline.

    Args:
        results: Results of a study whose arms differ from its baseline in one thing each.
        notes: What was concluded, by arm.
    """
    definitions = {run["arm"]: run["definition"] for run in results.runs}
    own = definitions.get(results.baseline, {})
    _, plain, signed = METRICS["dice"]
    rows = []
    for cell in results.cells():
        found = cell.differences.get("dice")
        difference = ["", ""] if found is None else [_interval(found.mean, signed), f"{found.p:.3g}"]
        changed = "; ".join(changes(own, definitions[cell.arm])) or "the baseline"
        dice = _interval(cell.metrics["dice"], plain) if "dice" in cell.metrics else "not defined"
        name = [str(cell.labelled), f"`{cell.arm}`"]
        rows.append([*name, changed, str(cell.draws), dice, *difference, notes.get(cell.arm, "")])
    header = ["labelled patients", "trial", "what differs", "draws", "Dice", f"difference to {results.baseline}", "p"]
    return markdown([*header, "conclusion"], rows)


def summary(tasks: Mapping[str, Sequence[Cell]], arms: Sequence[str]) -> str:
    """Markdown table of the Dice of some arms, a line for each task and number of labelled patients.

    Args:
        tasks: Cells of each task, by its name.
        arms: Columns, the baseline first; the others with their difference to it, bold if it is clear.
            Columns and lines without any comparison are left out.
    """
    _, plain, signed = METRICS["dice"]
    lines: list[tuple[list[str], dict[str, str]]] = []
    for name, cells in tasks.items():
        found = {(cell.labelled, cell.arm): cell for cell in cells if "dice" in cell.metrics}
        for labelled in dict.fromkeys(cell.labelled for cell in cells):
            own = {arm: found[labelled, arm] for arm in arms if (labelled, arm) in found}
            texts = {arm: plain.format(cell.metrics["dice"].value) for arm, cell in own.items()}
            for arm, cell in own.items():
                if "dice" in cell.differences:
                    mean = cell.differences["dice"].mean
                    difference = signed.format(mean.value)
                    texts[arm] += f" (**{difference}**)" if cell.clear else f" ({difference})"
            if arms[0] in texts and len(texts) > 1:
                lines.append(([name, str(labelled)], texts))
    shown = [arm for arm in arms if any(arm in texts for _, texts in lines)]
    rows = [[*head, *(texts.get(arm, "") for arm in shown)] for head, texts in lines]
    return markdown(["data", "labelled patients", *(f"`{arm}`" for arm in shown)], rows)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say in what one definition of an arm differs from another; an option that is not given has its default."""
    out = []
    for key in dict.fromkeys([*before, *after]):
        ours, theirs = before.get(key), after.get(key)
        if ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for name in dict.fromkeys([*ours, *theirs]):
                if ours.get(name) != theirs.get(name):
                    out.append(f"{key} `{name}`: {ours.get(name, 'default')} to {theirs.get(name, 'default')}")
        else:
            out.append(f"{key}: {_word(ours)} to {_word(theirs)}")
    return out


def _word(value: Any) -> str:
    return "none" if value is None else "some" if isinstance(value, Mapping) else str(value)


def _metric(cell: Cell, metric: str, plain: str, signed: str) -> list[str]:
    if metric not in cell.metrics:
        return ["not defined", "", "", ""]
    low, high = cell.spread[metric]
    out = [_interval(cell.metrics[metric], plain), f"{plain.format(low)}, {plain.format(high)}"]
    found = cell.differences.get(metric)
    return [*out, "", ""] if found is None else [*out, _interval(found.mean, signed), f"{found.p:.3g}"]


def _interval(mean: stats.Mean, style: str) -> str:
    return f"{style.format(mean.value)} ({style.format(mean.low)} to {style.format(mean.high)})"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"
