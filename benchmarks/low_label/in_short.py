"""What a user of today gets: the table of README and the first sentences of the evidence page.

Of the studies that compare with plain nnU-Net: those on test patients, or all if none is. Arms in an earlier form of
their trainer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import report
from .config import ALL
from .targets import PLAIN
from .told import Found

SHOWN = ("plain", "plain_pcl", "kaf_scratch", "kaf_all", "kaf_semi", "semi")
"""Arms of the table in the README."""
WORDS = {
    "semi": "with unlabelled scans in the training (`nnUNetTrainerSemi`)",
    "kaf_semi": "with them, KAF layers and pretraining (`nnUNetTrainerKAFSemi`)",
    "plain_pcl": "pretrained without KAF layers (`--network plain --preset pcl`)",
    "plain_simclr": "pretrained without KAF layers (`--network plain --preset simclr`)",
    "kaf_all": "KAF, pretrained",
    "kaf_scratch": "KAF, not pretrained",
}
"""What the sentences call the arms."""
IN_SHORT = """## In short

The question: a few patients are labelled, many are not; how much better is the segmentation when the unlabelled scans
are used, and by which of the ways that this package offers? Each way is compared with plain nnU-Net on the same
patients, with the same labelled ones and the same number of training steps. Dice is 1 for a perfect segmentation and 0
for a useless one. A difference is given with its 95 % interval; where that includes 0, the two may be equal. Here are
the results on test patients of the trainers as they are today, but that the semi-supervised ones had no limit yet for
structures that swell in their labels, and in some studies, which say so, a stricter guard. All others follow below.

The short answer, from short trainings of small networks:

- With two labelled patients, unlabelled scans in the training raised Dice in all three datasets: most on ACDC, least on
  Hippocampus, where nnU-Net alone is good already. With six the gain was smaller, and the draws too few to be sure.
- On ACDC the gain is that large in patches of whole slices, where nnU-Net alone finds little. In smaller patches
  nnU-Net alone does better, and the gain is smaller.
- Unlabelled scans double the time of a training. On CT, nnU-Net alone with twice the steps gained as much in short
  trainings, and less than one point of Dice in longer ones, in which the gain of unlabelled scans stayed
  (`openkbp_semi_twice`, `openkbp_long_twice`: two draws on validation patients each). Mistakes far away (HD95) became
  no fewer there.
- Pretraining alone gained little or nothing.
"""


def table(tasks: Sequence[Found]) -> str:
    """Markdown table of few labelled patients; without who was measured, to be short, if that is a test."""
    rows = {}
    for task, cells in _today(tasks):
        validation = "" if task.results.on == "test" else f", {task.patients} validation patients"
        few = [cell for cell in cells if cell.labelled != ALL]
        rows[f"{task.data} (`{task.results.study}`){validation}"] = few
    return report.summary(rows, SHOWN)


def sentences(tasks: Sequence[Found]) -> str:
    """What was found, the numbers from the results."""
    lines = [IN_SHORT]
    for task, cells in _today(tasks):
        items = []
        for labelled in dict.fromkeys(cell.labelled for cell in cells):
            items += _items(labelled, {cell.arm: cell for cell in cells if cell.labelled == labelled})
        if items:
            whose = f"{task.patients} {task.results.on} patients (`{task.results.study}`)"
            lines += [f"**{task.data}**, {whose}, mean Dice:\n", *items, ""]
    return "\n".join(lines)


def _today(tasks: Sequence[Found]) -> list[tuple[Found, list[report.Cell]]]:
    """Tasks, and their cells of the trainers as they are today."""
    compared = [task for task in tasks if task.results.baseline == PLAIN]
    shown = [task for task in compared if task.results.on == "test"] or compared
    return [
        (task, [cell for cell in task.results.cells() if cell.arm not in task.told.earlier and "dice" in cell.metrics])
        for task in shown
    ]


def _items(labelled: int | str, cells: Mapping[str, report.Cell]) -> list[str]:
    """One list item for a number of labelled patients: plain nnU-Net, and how far the others are from it."""
    if PLAIN not in cells or len(cells) == 1:
        return []
    parts = []
    for arm, what in WORDS.items():
        found = cells[arm].differences.get("dice") if arm in cells else None
        if found is None:
            continue
        mean, draws = found.mean, cells[arm].draws
        few = f"; {draws} draws, too few to be sure" if 1 < draws < report.ENOUGH_DRAWS else ""
        clear = few if mean.low > 0 or mean.high < 0 else ", not clearly different"
        parts.append(f"{what} {mean.value:+.3f} ({mean.low:+.3f} to {mean.high:+.3f}{clear})")
    if not parts:
        return []
    plain = cells[PLAIN].metrics["dice"].value
    once = ", one training of each (chance in it is not part of the intervals)" if cells[PLAIN].draws == 1 else ""
    return [f"- {labelled} labelled patients{once}: plain nnU-Net {plain:.3f}; " + "; ".join(parts) + "."]
