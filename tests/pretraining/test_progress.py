from __future__ import annotations

from pathlib import Path

import pytest

from pretraining.loop import METRICS
from pretraining.progress import plot_progress

RECORD = {**dict.fromkeys(METRICS, 0.5), "learning_rate": 1e-3}


def test_draws_a_png_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    plot_progress([RECORD, RECORD], tmp_path / "progress.png")
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_a_plot_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plot_progress([RECORD], tmp_path / "no such folder" / "progress.png")
    assert "Could not write" in caplog.text
