"""What the plugin promises for few labelled patients, held against a table."""

from __future__ import annotations

from collections.abc import Sequence

from common import markdown

from .config import ALL
from .report import Cell

PLAIN, SCRATCH, PRETRAINED, SEMI, KAF_SEMI = "plain", "kaf_scratch", "kaf_all", "semi", "kaf_semi"
GAINS: dict[int | str, float] = {2: 0.03, 6: 0.015, ALL: -0.003}
"""By number of labelled patients, the least mean difference in Dice, KAF pretrained minus plain nnU-Net."""
SEMI_GAINS: dict[int | str, float] = {2: 0.08, 6: 0.03}
"""The same for nnU-Net's network with unlabelled images in the training, minus plain nnU-Net."""
AHEAD = (2, 6)
"""Numbers of labelled patients at which KAF pretrained should be above every other pretrained arm."""


def table(cells: Sequence[Cell], pretrained: Sequence[str]) -> str:
    """Markdown table of the targets.

    Args:
        cells: Cells of one task, with `plain` as the baseline.
        pretrained: All arms with a pretraining.
    """
    dice = {(cell.labelled, cell.arm): cell.metrics["dice"].value for cell in cells if "dice" in cell.metrics}
    rows = []
    for labelled, least in GAINS.items():
        text = f"`{PRETRAINED}` minus `{PLAIN}`, {labelled} labelled: at least {least:+.3f}"
        rows.append([text, *_difference(dice, labelled, PRETRAINED, PLAIN, least)])
    for labelled in AHEAD:
        others = {arm: dice[labelled, arm] for arm in pretrained if arm != PRETRAINED and (labelled, arm) in dice}
        text = f"`{PRETRAINED}` above every other pretrained arm, {labelled} labelled"
        if not others or (labelled, PRETRAINED) not in dice:
            rows.append([text, "not measured", "not measured"])
            continue
        best = max(others, key=lambda arm: others[arm])
        gain = dice[labelled, PRETRAINED] - others[best]
        rows.append([text, f"{gain:+.4f} to the best of them, `{best}`", "yes" if gain > 0 else "**no**"])
    for labelled, least in SEMI_GAINS.items():
        text = f"`{SEMI}` minus `{PLAIN}`, {labelled} labelled: at least {least:+.3f}"
        rows.append([text, *_difference(dice, labelled, SEMI, PLAIN, least)])
        text = f"`{KAF_SEMI}` not below `{SEMI}`, {labelled} labelled"
        rows.append([text, *_difference(dice, labelled, KAF_SEMI, SEMI, 0.0)])
    for labelled in dict.fromkeys(cell.labelled for cell in cells):
        text = f"`{SCRATCH}` not below `{PLAIN}`, {labelled} labelled"
        rows.append([text, *_difference(dice, labelled, SCRATCH, PLAIN, 0.0)])
    return markdown(["target (mean Dice)", "found", "reached"], rows)


def _difference(
    dice: dict[tuple[int | str, str], float], labelled: int | str, ours: str, theirs: str, least: float
) -> list[str]:
    if (labelled, ours) not in dice or (labelled, theirs) not in dice:
        return ["not measured", "not measured"]
    found = dice[labelled, ours] - dice[labelled, theirs]
    return [f"{found:+.4f}", "yes" if found >= least else "**no**"]
