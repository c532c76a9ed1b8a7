"""The figure of a task: Dice against the number of labelled patients, one line per arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import METRICS, Cell


def draw(cells: Sequence[Cell], title: str, path: Path, metric: str = "dice") -> None:
    """Draw means with their intervals shaded.

    Args:
        cells: Cells of one task.
        title: Title of the figure.
        path: File to write.
        metric: "dice" or "hd95".
    """
    from matplotlib.figure import Figure

    labelled = list(dict.fromkeys(cell.labelled for cell in cells))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = ["-", "--", ":", "-."]
    for number, arm in enumerate(dict.fromkeys(cell.arm for cell in cells)):
        own = [cell for cell in cells if cell.arm == arm and metric in cell.metrics]
        x = [labelled.index(cell.labelled) for cell in own]
        means = [cell.metrics[metric] for cell in own]
        # Ten colours, and another line style for each further ten arms.
        color, style = f"C{number % 10}", styles[number // 10 % len(styles)]
        axes.plot(x, [mean.value for mean in means], marker="o", label=arm, color=color, linestyle=style)
        axes.fill_between(x, [m.low for m in means], [m.high for m in means], alpha=0.1, color=color)
    axes.set_xticks(range(len(labelled)), [str(number) for number in labelled])
    axes.set_xlabel("labelled patients")
    axes.set_ylabel(METRICS[metric][0])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
