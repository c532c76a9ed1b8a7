"""The faults of `make faults`, a few times each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from reliability import faults, work

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def tiny_work(tmp_path_factory: pytest.TempPathFactory) -> work.Work:
    made = work.prepare(tmp_path_factory.mktemp("faults"), with_training=False)
    made.kills = 2
    return made


@pytest.mark.parametrize(
    "attempt", [faults.killed, faults.stopped, faults.out_of_disk, faults.vanishing, faults.two_at_once]
)
def test_a_fault_costs_nothing_but_time(attempt: Callable[[work.Work, int], str], tiny_work: work.Work) -> None:
    assert attempt(tiny_work, 0) == ""


def test_an_undisturbed_run_is_repeatable(tiny_work: work.Work, tmp_path: Path) -> None:
    assert faults.completed(tiny_work, "second") == ""
