import argparse
import json
from pathlib import Path

import dice_vs_plain
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "dice_vs_plain.json"


def test_difference_is_paired_by_case() -> None:
    results = {
        "plain": {"dice_per_case": {"a": 0.5, "b": 0.9}},
        "kaf_scratch": {"dice_per_case": {"a": 0.6, "b": 0.9}},
    }
    difference = dice_vs_plain.differences(results, seed=0)["kaf_scratch"]
    assert difference["mean"] == pytest.approx(0.05)
    assert difference["interval_95"] == [0.0, 0.1]
    assert dice_vs_plain.differences({"kaf_scratch": results["kaf_scratch"]}, seed=0) == {}


def test_a_work_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    def options(seed: int) -> argparse.Namespace:
        return argparse.Namespace(work=tmp_path / "work", arms=["plain"], out=tmp_path / "out.json", seed=seed)

    dice_vs_plain.check_work(options(0))
    dice_vs_plain.check_work(options(0))
    with pytest.raises(SystemExit, match=r"other options \(seed 0 != 1\)"):
        dice_vs_plain.check_work(options(1))


def test_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = dice_vs_plain.interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=2e-3)
    assert high == pytest.approx(values.mean() + half, abs=2e-3)


def test_the_page_shows_the_committed_numbers() -> None:
    table = dice_vs_plain.table(json.loads(RESULTS.read_text()))
    assert table in (ROOT / "docs" / "performance.md").read_text()
