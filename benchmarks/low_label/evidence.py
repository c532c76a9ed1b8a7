"""Write the tables and figures of the studies, and docs/evidence.md, from the results alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import figures, report
from .config import Study

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
HEADER = """# Segmentation with few labelled patients

Written by `python -m benchmarks.low_label --report` from the files in `benchmarks/results/low_label`, which hold every
case of every run. How it was measured, and the command that repeats it: the head of
`benchmarks/low_label/__main__.py`.

- Dice and distance are averaged over the classes of a case, the cases of a patient, and the draws; then over patients.
- Intervals are 95 % bootstrap intervals over patients. Differences are paired by patient, with the same labelled
  patients; p is that of a two-sided Wilcoxon signed-rank test, not corrected for the number of comparisons.
- The intervals say how much the means depend on the patients that are measured. How much they depend on the labelled
  patients and on the seed is shown by the smallest and the largest mean of a draw.
- HD95 is the 95 % Hausdorff distance. A class that is missing in the prediction or in the reference alone counts as
  Dice 0 and as the diagonal of the image; one that is missing in both is left out.
- Training seconds are those of the epochs; pretraining seconds those of the whole command. One pretraining serves all
  runs that share it, and is given in full for each; the first one of a task also detects the keypoints of all cases.
  "unknown": the run was interrupted.
"""


def write_task(folder: Path, arms: Sequence[str]) -> list[Path]:
    """Write table and figures of a task next to its runs.

    Returns:
        The tables that were written; none if there are no runs.
    """
    written = []
    for on in ("validation", "test"):
        results = report.load(folder, on, arms)
        if results is None:
            continue
        cells = results.cells()
        for metric in report.METRICS:
            title = f"{results.task}, {on} patients"
            figures.draw(cells, title, folder / f"{on}_{metric}.png", metric)
        table = folder / f"{on}.md"
        table.write_text(report.table(cells) + "\n")
        written.append(table)
    return written


def write_study(study: Study, out: Path) -> list[Path]:
    """Write table and figures of all tasks of a study."""
    arms = [arm.name for arm in study.arms]
    return [path for task in study.tasks for path in write_task(out / study.name / task.name, arms)]


def write_evidence(out: Path, target: Path) -> None:
    """Write the page; a task is shown on its test patients once they were used, otherwise on those for validation."""
    parts = [HEADER]
    for folder in sorted({file.parents[2] for file in out.glob("*/*/runs/*/*.json")}):
        results = report.load(folder, "test") or report.load(folder, "validation")
        if results is None:
            continue
        arms = list(dict.fromkeys(run["arm"] for run in _configured(results, folder)))
        results = report.load(folder, results.on, arms) or results
        write_task(folder, arms)
        parts.append(section(results, Path(os.path.relpath(folder, target.parent))))
    if len(parts) == 1:
        parts.append("Not measured yet.\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(parts))


def section(results: report.Results, folder: Path) -> str:
    """Describe one task: what was run, the table, the figures."""
    first = results.runs[0]
    setting, cells = first["setting"], results.cells()
    return "\n".join(
        [
            f"## {results.study}: {results.task}",
            "",
            _who(results),
            _what(setting, results.runs),
            "",
            report.table(cells),
            "",
            *(f"![{title}]({folder.as_posix()}/{results.on}_{m}.png)" for m, (title, _, _) in report.METRICS.items()),
            "",
        ]
    )


def _who(results: report.Results) -> str:
    first = results.runs[0]
    patients, cases = len(set(first["patient_of"].values())), len(first["cases"])
    kind = {
        "test": "Measured on {} test patients ({} cases), used once, after all trainings.",
        "validation": "Measured on {} validation patients ({} cases): for choices, **not a test result**.",
    }[results.on].format(patients, cases)
    everybody = max(len(run["patients"]) for run in results.runs)
    return f"{kind} At most {everybody} labelled patients."


def _what(setting: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    task = setting["task"]
    smaller = f", images averaged over {task['downsample']} x {task['downsample']} voxels" * (task["downsample"] > 1)
    mirrored = "" if setting["mirror_predictions"] else ", predictions without mirroring"
    batch = "the planned batch" if task["batch_size"] is None else f"a batch of {task['batch_size']}"
    machines = sorted({_machine(run["machine"]) for run in runs})
    packages = ("torch", "nnunetv2", "nnunetv2-kaf")
    versions = sorted({", ".join(f"{name} {run['versions'].get(name)}" for name in packages) for run in runs})
    iterations = setting["epochs"] * setting["iterations"]
    commits = sorted({run["commit"] for run in runs})
    lengths = sorted({run["cost"]["pretraining_iterations"] for run in runs} - {0})
    pretraining = f", pretraining of {' or '.join(map(str, lengths))} iterations" if lengths else ""
    return (
        f"{task['data']}, `{task['configuration']}`{smaller}; {iterations} iterations with "
        f"{batch}{pretraining}, last checkpoint{mirrored}; {len(runs)} trainings. {'; '.join(machines)}; "
        f"{'; '.join(versions)}; commit {', '.join(commits)}."
    )


def _machine(machine: Mapping[str, Any]) -> str:
    accelerator = f", {machine['accelerator']}" if "accelerator" in machine else ""
    return f"{machine['processor']}, {machine['cores']} cores{accelerator}"


def _configured(results: report.Results, folder: Path) -> Sequence[Mapping[str, Any]]:
    """Runs in the order of the config, if it is among ours; otherwise as they are."""
    config = Path(__file__).with_name(f"{results.study}.json")
    from .layout import read_json

    order = {name: i for i, name in enumerate((read_json(config) or {}).get("arms", {}))}
    return sorted(results.runs, key=lambda run: order.get(run["arm"], len(order)))
