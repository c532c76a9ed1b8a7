"""Write the tables and figures of the studies, and docs/evidence.md, from the results alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attention_page
from common import markdown

from nnunetv2_kaf.errors import KAFError
from pretraining.config import COMPONENTS
from pretraining.monitoring.monitor import GLOBAL_LOSSES

from . import figures, in_short, report, seen, targets
from .config import ALL, SEMI_TRAINERS, Study
from .layout import read_json
from .targets import PLAIN
from .told import Found, found, told

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
README = EVIDENCE.parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
TITLE = "# Segmentation with few labelled patients\n"
HEADER = """## How it was measured

Written by `python -m benchmarks.low_label --report` from the files in `benchmarks/results/low_label`, which hold every
case of every run. How it was measured, and the command that repeats it: the head of
`benchmarks/low_label/__main__.py`.

- Dice and distance are averaged over the classes of a case, the cases of a patient, and the draws; then over patients.
- Intervals are 95 % bootstrap intervals over patients and draws together: which patients are labelled matters as much
  as which ones are measured. With one draw they are over patients alone, and with less than five they are too short: so
  few draws say little about all. A difference is called clear with five draws or more only. Differences are paired by
  draw and patient; p is that of a two-sided Wilcoxon signed-rank test over patients, not corrected for the number of
  comparisons.
- All draws of an arm start from one pretraining: chance in it is in no interval.
- The test patients of a study are measured once, after its trainings. But a dataset has few patients: most were seen in
  tests of earlier studies, and some by choices. Each study says how many, and what is left without the latter. Studies
  whose results have been removed since then count too.
- Plans, and on CT the intensities by which images are normalised, are made from all patients but those of the test, as
  nnU-Net does it with a dataset; the intensities are those of labelled voxels, also of the patients that count as
  unlabelled. This is the same for all arms. With few labelled patients alone it would be less exact.
- HD95 is the 95 % Hausdorff distance. A class that is missing in the prediction or in the reference alone counts as
  Dice 0 and as the diagonal of the image; one that is missing in both is left out.
- Training seconds are those of the epochs; pretraining seconds those of the whole command. One pretraining serves all
  runs that share it, and is given in full for each; the first one of a task also detects the keypoints of all cases.
  "unknown": the run was interrupted.
"""


def write_task(folder: Path, arms: Sequence[str], baseline: str) -> list[Path]:
    """Write table and figures of a task next to its runs.

    Returns:
        The tables that were written; none if there are no runs.
    """
    written = []
    for on in ("validation", "test"):
        results = report.load(folder, on, arms, baseline)
        if results is None:
            continue
        cells = results.cells()
        for metric in report.METRICS:
            title = f"{results.task}, {on} patients"
            figures.draw(cells, title, folder / f"{on}_{metric}.png", metric)
        table = folder / f"{on}.md"
        table.write_text(report.table(cells, baseline) + "\n")
        written.append(table)
    return written


def write_study(study: Study, out: Path) -> list[Path]:
    """Write table and figures of all tasks of a study."""
    arms = [arm.name for arm in study.arms]
    folders = [out / study.name / task.name for task in study.tasks]
    return [path for folder in folders for path in write_task(folder, arms, study.baseline)]


def write_evidence(out: Path, target: Path) -> None:
    """Write the page, and the tables and figures that it shows."""
    for task in found(out):
        write_task(task.folder, task.told.arms, task.told.baseline)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(out, target))


def write_readme(out: Path, target: Path) -> None:
    """Replace the table between the two marks of the README.

    Raises:
        KAFError: There is not one mark of each kind.
    """
    text = target.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise KAFError(f"{target}: expected one line {BEGIN} and one line {END}, between which the table is written.")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    target.write_text(f"{before}{BEGIN}\n\n{in_short.table(found(out))}\n\n{END}{after}", encoding="utf-8")


def page(out: Path, target: Path) -> str:
    """Compose the page; a task is shown on its test patients once they were used, otherwise on those for validation.

    Args:
        out: Folder of the results.
        target: Place of the page, for its links.
    """
    tasks = found(out)
    parts = [TITLE, in_short.sentences(tasks), HEADER]
    for task in tasks:
        parts.append(section(task, Path(os.path.relpath(task.folder, target.parent))))
    parts += filter(None, [attention_page.summary(out.parent)])
    parts += [f"## {name}\n\nNot measured yet. {told(name).comment}\n" for name in _unmeasured(out)]
    return "\n".join(parts)


def _unmeasured(out: Path) -> list[str]:
    """Committed studies that have no results; the smallest one only tries the machinery."""
    names = {file.stem for file in Path(__file__).parent.glob("*.json")} - {"smoke"}
    return sorted(name for name in names if not any((out / name).glob("*/runs/*/*.json")))


def section(task: Found, folder: Path) -> str:
    """Describe one task: what was run, the table, the targets, the figures.

    Args:
        task: The task.
        folder: Of its results, relative to the page.
    """
    results, study = task.results, task.told
    first = results.runs[0]
    setting, cells = first["setting"], results.cells()
    if results.baseline == PLAIN:
        tables = [report.table(cells, results.baseline), ""]
        definitions = {run["arm"]: run["definition"] for run in results.runs}
        pretrained = [
            arm for arm, own in definitions.items() if own["pretraining"] and own["trainer"] not in SEMI_TRAINERS
        ]
        if results.on == "test":
            dataset = setting["task"]["data"].partition("_")[2]
            tables += [
                targets.table(cells, pretrained, dataset),
                "",
                *([study.conclusion, ""] if study.conclusion else []),
            ]
            tables += [f"Validation patients: [validation.md]({folder.as_posix()}/validation.md).", ""]
        links = [
            f"![{title}]({folder.as_posix()}/{results.on}_{metric}.png)"
            for metric, (title, _, _) in report.METRICS.items()
        ]
        tables += [*links, ""]
    else:
        tables = [report.trials(results, study.notes), ""]
    return "\n".join(
        [
            f"## {results.study}: {results.task}",
            "",
            *([study.comment, ""] if study.comment else []),
            _who(results),
            *_before(task),
            f"{_what(setting, results.runs)}; {_commits(task)}.",
            "",
            *tables,
            curves(task.folder),
        ]
    )


def curves(folder: Path) -> str:
    """Markdown table of the pretrainings of a task: losses against collapse, and the held-out pairs before and after.

    Args:
        folder: Results of the task.

    Returns:
        Nothing if there was none.
    """
    rows = []
    for file in sorted((folder / "pretraining").glob("*.json")):
        content = read_json(file)
        first, last = content["history"][0], content["history"][-1]
        pairs = content["options"].get("batch_size")
        collapse = f" of {math.log(2 * pairs - 1):.2f}" if pairs else ""
        losses = [f"{name} {last[name]:.2f}{collapse}" for name in GLOBAL_LOSSES if name in last]
        losses += [f"{name} {last[name]:.2f}" for name in COMPONENTS if name in last and name not in GLOBAL_LOSSES]
        measured = [f"{first[name]:.2f} to {last[name]:.2f}" for name in ("uniformity", "alignment", "recall_at_1")]
        rows.append([f"`{content['arm']}`", content["network"], "<br>".join(losses), *measured])
    if not rows:
        return ""
    header = ["pretraining, first used by", "network", "losses at the end; global ones of their value at collapse"]
    return markdown([*header, "uniformity", "alignment", "recall at 1"], rows) + "\n"


def _who(results: report.Results) -> str:
    first = results.runs[0]
    patients, cases = len(set(first["patient_of"].values())), len(first["cases"])
    kind = {
        "test": "Measured on {} test patients ({} cases), used once, after all trainings.",
        "validation": "Measured on {} validation patients ({} cases): for choices, **not a test result**.",
    }[results.on].format(patients, cases)
    everybody = {len(run["patients"]) for run in results.runs if run["labelled"] == ALL}
    return " ".join([kind, *(f'"{ALL}" are {number} labelled patients.' for number in everybody)])


def _before(task: Found) -> list[str]:
    """What the test patients were used for besides this table."""
    opened = read_json(task.folder / "test_opened.json")
    if task.results.on != "test" or opened is None:
        return []
    shown = {run["arm"] for run in task.results.runs}
    left_out = sorted({name.rsplit("_M", 1)[0] for name in opened["runs"]} - shown)
    names = ", ".join(f"`{name}`" for name in left_out)
    also = [f"Measured on them as well, and left out afterwards: {names} (in the history of the repository)."]
    return [*(also if left_out else []), seen.sentences(task.folder.parents[1], task.results, opened["when"])]


def _commits(task: Found) -> str:
    """Which versions of the code the trainings are of, and the measurement."""
    results = task.results
    trained = report.load(task.folder, "validation") or results
    shown = {run["arm"] for run in results.runs}
    arms: dict[str, set[str]] = {}
    for run in trained.runs:
        if run["arm"] in shown:
            arms.setdefault(_short(run["commit"]), set()).add(run["arm"])
    words = [f"{commit} ({', '.join(f'`{arm}`' for arm in sorted(names))})" for commit, names in arms.items()]
    code = ", ".join(words if len(words) > 1 else arms)
    measured = sorted({_short(run["commit"]) for run in results.runs})
    return f"code of {code}" + (f", measured with {', '.join(measured)}" if measured != list(arms) else "")


def _short(commit: str) -> str:
    name, _, changed = commit.partition("-")
    return name[:10] + (" with changes that are not in it" if changed else "")


def _what(setting: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    task = setting["task"]
    smaller = f", images averaged over {task['downsample']} x {task['downsample']} voxels" * (task["downsample"] > 1)
    mirrored = "" if setting["mirror_predictions"] else ", predictions without mirroring"
    batch = "the planned batch" if task["batch_size"] is None else f"a batch of {task['batch_size']}"
    machines = sorted({_machine(run["machine"]) for run in runs})
    packages = ("torch", "nnunetv2", "nnunetv2-kaf")
    versions = sorted({", ".join(f"{name} {run['versions'].get(name)}" for name in packages) for run in runs})
    iterations = setting["epochs"] * setting["iterations"]
    lengths = sorted({run["cost"]["pretraining_iterations"] for run in runs} - {0})
    pretraining = f", pretraining of {' or '.join(map(str, lengths))} iterations" if lengths else ""
    return (
        f"{task['data']}, `{task['configuration']}`{smaller}; {iterations} iterations with "
        f"{batch}{pretraining}, last checkpoint{mirrored}; {len(runs)} trainings. {'; '.join(machines)}; "
        f"{'; '.join(versions)}"
    )


def _machine(machine: Mapping[str, Any]) -> str:
    accelerator = f", {machine['accelerator']}" if "accelerator" in machine else ""
    return f"{machine['processor']}, {machine['cores']} cores{accelerator}"
