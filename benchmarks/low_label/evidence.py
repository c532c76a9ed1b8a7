"""Write the tables and figures of the studies, and docs/evidence.md, from the results alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention_page
from common import markdown

from nnunetv2_kaf.errors import KAFError
from pretraining.config import COMPONENTS
from pretraining.monitoring.monitor import GLOBAL_LOSSES

from . import figures, report, targets
from .config import ALL, SEMI_TRAINERS, Study
from .layout import RESULTS, read_json
from .targets import PLAIN

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
README = EVIDENCE.parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
SHOWN = ("plain", "plain_pcl", "kaf_scratch", "kaf_all", "kaf_semi", "semi")
"""Arms of the table in the README."""
WORDS = {
    "semi": "with unlabelled scans in the training (`nnUNetTrainerSemi`)",
    "kaf_semi": "with them, KAF layers and pretraining (`nnUNetTrainerKAFSemi`)",
    "plain_pcl": "pretrained without KAF layers (`--network plain --preset pcl`)",
    "kaf_all": "KAF, pretrained",
    "kaf_scratch": "KAF, not pretrained",
}
"""What the sentences call the arms."""
TITLE = "# Segmentation with few labelled patients\n"
IN_SHORT = """## In short

The question: a few patients are labelled, many are not; how much better is the segmentation when the unlabelled scans
are used, and by which of the ways that this package offers? Each way is compared with plain nnU-Net on the same
patients, with the same labelled ones and the same number of training steps. Dice is 1 for a perfect segmentation and 0
for a useless one. A difference is given with its 95 % interval; where that includes 0, the two may be equal. Here are
the results on test patients of the trainers as they are today; all others follow below.

The short answer: with two labelled patients, unlabelled scans in the training raised Dice in all three datasets, most
on ACDC and least on Hippocampus, where nnU-Net alone is good already; with six by less, on CT not clearly. Pretraining
alone gained little. All trainings were short, of small networks.
"""
HEADER = """## How it was measured

Written by `python -m benchmarks.low_label --report` from the files in `benchmarks/results/low_label`, which hold every
case of every run. How it was measured, and the command that repeats it: the head of
`benchmarks/low_label/__main__.py`.

- Dice and distance are averaged over the classes of a case, the cases of a patient, and the draws; then over patients.
- Intervals are 95 % bootstrap intervals over patients and draws together: which patients are labelled matters as much
  as which ones are measured. With one draw they are over patients alone. Differences are paired by draw and patient; p
  is that of a two-sided Wilcoxon signed-rank test over patients, not corrected for the number of comparisons.
- HD95 is the 95 % Hausdorff distance. A class that is missing in the prediction or in the reference alone counts as
  Dice 0 and as the diagonal of the image; one that is missing in both is left out.
- Training seconds are those of the epochs; pretraining seconds those of the whole command. One pretraining serves all
  runs that share it, and is given in full for each; the first one of a task also detects the keypoints of all cases.
  "unknown": the run was interrupted.
"""


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
    for folder in _folders(out):
        study = told(folder.parent.name)
        write_task(folder, study.arms, study.baseline)
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
    target.write_text(f"{before}{BEGIN}\n\n{results_table(out)}\n\n{END}{after}", encoding="utf-8")


def results_table(out: Path) -> str:
    """Markdown table of what a user of today gets; without the patients, to be short, if they are those of a test."""
    tasks = {}
    for data, patients, study, cells in _today(out):
        tasks[f"{data} (`{study}`)" + ("" if patients.endswith("test patients") else f", {patients}")] = cells
    return report.summary(tasks, SHOWN)


def _today(out: Path) -> list[tuple[str, str, str, list[report.Cell]]]:
    """Data, patients, study, and cells of the trainers as they are today.

    Of the studies that compare with plain nnU-Net: those on test patients, or all if none is. Arms in an earlier form
    of their trainer are left out.
    """
    found = [results for results in map(_latest, _folders(out)) if results.baseline == PLAIN]
    told_of_today = []
    for results in [results for results in found if results.on == "test"] or found:
        run, earlier = results.runs[0], told(results.study).earlier
        task, count = run["setting"]["task"], len(set(run["patient_of"].values()))
        data = f"{task['data'].partition('_')[2]} `{task['configuration']}`"
        cells = [cell for cell in results.cells() if cell.arm not in earlier and "dice" in cell.metrics]
        told_of_today.append((data, f"{count} {results.on} patients", results.study, cells))
    return told_of_today


def page(out: Path, target: Path) -> str:
    """Compose the page; a task is shown on its test patients once they were used, otherwise on those for validation.

    Args:
        out: Folder of the results.
        target: Place of the page, for its links.
    """
    parts = [TITLE, in_short(out), HEADER]
    for folder in _folders(out):
        study, results = told(folder.parent.name), _latest(folder)
        parts.append(section(results, study, Path(os.path.relpath(folder, target.parent))))
    parts += filter(None, [attention_page.summary(out.parent)])
    parts += [f"## {name}\n\nNot measured yet. {told(name).comment}\n" for name in _unmeasured(out)]
    return "\n".join(parts)


def _folders(out: Path) -> list[Path]:
    """Results of all tasks, those on test patients before the others, and trials last."""
    found = {file.parents[2] for file in out.glob("*/*/runs/*/*.json")}

    def order(folder: Path) -> tuple[bool, bool, Path]:
        return told(folder.parent.name).baseline != PLAIN, not (folder / "runs" / "test").is_dir(), folder

    return sorted(found, key=order)


def _latest(folder: Path) -> report.Results:
    """Results of a task on its test patients, or on those for validation as long as the test was not used."""
    study = told(folder.parent.name)
    found = [report.load(folder, on, study.arms, study.baseline) for on in ("test", "validation")]
    results = found[0] or found[1]
    assert results is not None, "a folder of results has runs"
    return results


def in_short(out: Path) -> str:
    """What the studies found for the trainers of today, in sentences, the numbers from the results."""
    lines = [IN_SHORT]
    for data, patients, study, cells in _today(out):
        sentences = []
        for labelled in dict.fromkeys(cell.labelled for cell in cells):
            sentences += _sentences(labelled, {cell.arm: cell for cell in cells if cell.labelled == labelled})
        if sentences:
            lines += [f"**{data}**, {patients} (`{study}`), mean Dice:\n", *sentences, ""]
    return "\n".join(lines)


def _sentences(labelled: int | str, cells: Mapping[str, report.Cell]) -> list[str]:
    """One list item for a number of labelled patients: plain nnU-Net, and how far the others are from it."""
    if PLAIN not in cells or len(cells) == 1:
        return []
    parts = []
    for arm, what in WORDS.items():
        found = cells[arm].differences.get("dice") if arm in cells else None
        if found is None:
            continue
        mean = found.mean
        clear = "" if mean.low > 0 or mean.high < 0 else ", not clearly different"
        parts.append(f"{what} {mean.value:+.3f} ({mean.low:+.3f} to {mean.high:+.3f}{clear})")
    if not parts:
        return []
    plain = cells[PLAIN].metrics["dice"].value
    once = ", one training of each (chance in it is not part of the intervals)" if cells[PLAIN].draws == 1 else ""
    return [f"- {labelled} labelled patients{once}: plain nnU-Net {plain:.3f}; " + "; ".join(parts) + "."]


def _unmeasured(out: Path) -> list[str]:
    """Committed studies that have no results; the smallest one only tries the machinery."""
    names = {file.stem for file in Path(__file__).parent.glob("*.json")} - {"smoke"}
    return sorted(name for name in names if not any((out / name).glob("*/runs/*/*.json")))


def section(results: report.Results, study: Told, folder: Path) -> str:
    """Describe one task: what was run, the table, the targets, the figures."""
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
            tables += [f"Choices were made on other patients: [validation.md]({folder.as_posix()}/validation.md).", ""]
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
            _what(setting, results.runs),
            "",
            *tables,
            curves(RESULTS / results.study / results.task),
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
