"""What the plugin promises for few labelled patients, held against a table."""

from __future__ import annotations

from collections.abc import Sequence

from common import markdown

from .config import ALL
from .report import Cell

PLAIN, SCRATCH, PRETRAINED, SEMI, KAF_SEMI = "plain", "kaf_scratch", "kaf_all", "semi", "kaf_semi"
GAINS: dict[int | str, float] = {2: 0.03, 6: 0.015, ALL: -0.003}
"""By number of labelled patients, the least mean difference in Dice, KAF pretrained minus plain nnU-Net."""
SEMI_GAINS: dict[int | str, float] = {2: 0.05, 6: 0.03}
"""The same for nnU-Net's network with unlabelled images in the training, minus plain nnU-Net."""
LARGER_SEMI_GAINS = {("ACDC", 2): 0.08}
"""Where more than that is expected, by dataset and number of labelled patients."""
AHEAD = (2, 6)
"""Numbers of labelled patients at which KAF pretrained should be above every other pretrained arm."""


def table(cells: Sequence[Cell], pretrained: Sequence[str], dataset: str = "") -> str:
    """Markdown table of the targets.

    Args:
        cells: Cells of one task, with `plain` as the baseline.
        pretrained: All arms with a pretraining.
        dataset: Its name without the number.
    """
    dice, hd95 = (
        {(cell.labelled, cell.arm): cell.metrics[metric].value for cell in cells if metric in cell.metrics}
        for metric in ("dice", "hd95")
    )
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
    for labelled, usual in SEMI_GAINS.items():
        least = LARGER_SEMI_GAINS.get((dataset, int(labelled)), usual)
        text = f"`{SEMI}` minus `{PLAIN}`, {labelled} labelled: at least {least:+.3f}"
        rows.append([text, *_difference(dice, labelled, SEMI, PLAIN, least)])
        text = f"HD95 of `{SEMI}` below that of `{PLAIN}`, {labelled} labelled"
        rows.append([text, *_difference(hd95, labelled, SEMI, PLAIN, 0.0, " mm", -1)])
        text = f"`{KAF_SEMI}` not below `{SEMI}`, {labelled} labelled"
        rows.append([text, *_difference(dice, labelled, KAF_SEMI, SEMI, 0.0)])
    for labelled in dict.fromkeys(cell.labelled for cell in cells):
        text = f"`{SCRATCH}` not below `{PLAIN}`, {labelled} labelled"
        rows.append([text, *_difference(dice, labelled, SCRATCH, PLAIN, 0.0)])
    return markdown(["target (mean Dice if nothing else is said)", "found", "reached"], rows)


def _difference(
    values: dict[tuple[int | str, str], float],
    labelled: int | str,
    ours: str,
    theirs: str,
    least: float,
    unit: str = "",
    sign: int = 1,
) -> list[str]:
    """What was found, and whether it is the least gain; `sign` is -1 where lower is better."""
    if (labelled, ours) not in values or (labelled, theirs) not in values:
        return ["not measured", "not measured"]
    found = values[labelled, ours] - values[labelled, theirs]
    return [f"{found:+.{2 if unit else 4}f}{unit}", "yes" if sign * found >= least else "**no**"]
