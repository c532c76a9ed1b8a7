from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretraining.config import COMPONENTS
from pretraining.monitoring.progress import PANELS, draw_progress, plot_progress

MONITORED = {"recall_at_1": 0.1, "recall_at_5": 0.3, "alignment": 1.2, "uniformity": -2.5, "effective_rank": 14.0}
BEFORE = {"epoch": 0.0, **MONITORED}


def record(epoch: int, **values: float) -> dict[str, float]:
    losses = dict.fromkeys(("total", *COMPONENTS), 1.0 / epoch)
    return {"epoch": float(epoch), **losses, "matched": 0.5, "learning_rate": 1e-3, **MONITORED, **values}


def lines(history: list[dict[str, float]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Panel -> line -> (epochs, values) as drawn."""
    figure = draw_progress(history)
    return {axes.get_ylabel(): _lines(axes) for axes in figure.axes} if figure is not None else {}


def _lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_draws_every_number_at_its_epoch() -> None:
    drawn = lines([BEFORE, record(1, matched=0.25), record(2, effective_rank=20.0)])
    assert list(drawn) == [panel.label for panel in PANELS]
    assert drawn["loss"] == dict.fromkeys(("total", *COMPONENTS), ([1, 2], [1, 0.5]))
    assert drawn["keypoints (%)"] == {
        "matched": ([1, 2], [25, 50]),
        "recall at 1": ([0, 1, 2], pytest.approx([10, 10, 10])),
        "recall at 5": ([0, 1, 2], pytest.approx([30, 30, 30])),
    }
    assert drawn["global vectors"] == {
        "alignment": ([0, 1, 2], [1.2, 1.2, 1.2]),
        "uniformity": ([0, 1, 2], [-2.5, -2.5, -2.5]),
    }
    assert drawn["effective rank"] == {"effective rank": ([0, 1, 2], [14, 14, 20])}
    assert drawn["learning rate"] == {"learning rate": ([1, 2], [1e-3, 1e-3])}


def test_draws_only_what_the_run_has() -> None:
    assert lines([]) == {}
    assert lines([{"epoch": 0.0}]) == {}
    assert list(lines([BEFORE])) == ["keypoints (%)", "global vectors", "effective rank"]
    drawn = lines([{"epoch": 1.0, "total": 2.0, "bottleneck": 2.0, "learning_rate": 1e-3}])
    assert {panel: list(names) for panel, names in drawn.items()} == {
        "loss": ["total", "bottleneck"],
        "learning rate": ["learning rate"],
    }


@pytest.mark.parametrize("missing", [math.nan, math.inf, None])
def test_bridges_epochs_without_a_number(missing: float | None) -> None:
    middle = record(2)
    if missing is None:
        del middle["recall_at_1"]
    else:
        middle["recall_at_1"] = missing
    drawn = lines([record(1), middle, record(3)])
    assert drawn["keypoints (%)"]["recall at 1"][0] == [1, 3]
    assert drawn["keypoints (%)"]["recall at 5"][0] == [1, 2, 3]


def test_continues_at_the_epochs_of_the_records() -> None:
    assert lines([record(7), record(9)])["loss"]["total"][0] == [7, 9]
    nowhere = record(8)
    del nowhere["epoch"]
    assert lines([record(7), nowhere])["loss"]["total"][0] == [7]


def test_a_learning_rate_of_zero_fits_on_its_logarithmic_axis() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = lines([record(1, learning_rate=1e-3), record(2, learning_rate=0.0)])
        assert drawn["learning rate"]["learning rate"] == ([1], [1e-3])
        assert "learning rate" not in lines([record(1, learning_rate=0.0)])


def test_draws_a_png_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "progress.png"
    plot_progress([BEFORE, record(1)], path)
    first = path.read_bytes()
    plot_progress([BEFORE, record(1), record(2)], path)
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert path.read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_draws_nothing_from_nothing(tmp_path: Path) -> None:
    plot_progress([], tmp_path / "progress.png")
    plot_progress([{"epoch": 0.0}], tmp_path / "progress.png")
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a file").touch()
    plot_progress([record(1)], tmp_path / "a file" / "progress.png")
    assert "No curves were drawn" in caplog.text


def test_a_plot_that_cannot_be_moved_keeps_the_earlier_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "progress.png").mkdir()
    plot_progress([record(1)], tmp_path / "progress.png")
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]
    assert "No curves were drawn" in caplog.text


def test_leaves_the_random_state_alone(tmp_path: Path) -> None:
    _, before, position, *_ = np.random.get_state()  # noqa: NPY002
    plot_progress([BEFORE, record(1)], tmp_path / "progress.png")
    _, after, end, *_ = np.random.get_state()  # noqa: NPY002
    assert (after.tolist(), end) == (before.tolist(), position)
