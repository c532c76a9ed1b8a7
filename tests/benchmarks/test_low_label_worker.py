from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from low_label import worker
from low_label.worker import Step

from nnunetv2_kaf.errors import KAFError


def step(tmp_path: Path, name: str, identity: str = "i") -> Step:
    return Step(str(tmp_path / f"{name}.json"), identity, [name], str(tmp_path / name), {})


class Fake:
    """Stands for the commands: writes the product of a step; may fail or be killed."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.products = {s.command[0]: s.product for s in steps}
        self.ran: list[str] = []
        self.error: dict[str, BaseException] = {}

    def __call__(self, words: Sequence[str]) -> None:
        self.ran.append(words[0])
        if words[0] in self.error:
            raise self.error.pop(words[0])
        Path(self.products[words[0]]).write_text("done")


def test_finished_steps_are_not_repeated(tmp_path: Path) -> None:
    steps = [step(tmp_path, "a"), step(tmp_path, "b")]
    fake = Fake(steps)
    fake.error["b"] = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        worker.run_steps(steps, fake)
    assert [worker.is_done(s) for s in steps] == [True, False]
    worker.run_steps(steps, fake)
    worker.run_steps(steps, fake)
    assert fake.ran == ["a", "b", "b"]
    assert worker.state(steps[1])["attempts"] == 2
    assert worker.state(steps[1])["seconds"] is not None


def test_seconds_of_a_killed_attempt_stay_unknown(tmp_path: Path) -> None:
    one = step(tmp_path, "a")
    killed = {"identity": "i", "attempts": 1, "done": False, "seconds": None}
    Path(one.record).write_text(json.dumps(killed))
    worker.run_steps([one], Fake([one]))
    assert worker.state(one) == {**killed, "attempts": 2, "done": True}


def test_a_lost_product_is_made_again_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    one = step(tmp_path, "a")
    fake = Fake([one])
    worker.run_steps([one], fake)
    Path(one.product).unlink()
    worker.run_steps([one], fake)
    assert fake.ran == ["a", "a"]
    Path(one.product).unlink()
    with pytest.raises(SystemExit, match="a ended without"):
        worker.run_steps([one], lambda words: None)


def test_records_of_other_options_are_refused(tmp_path: Path) -> None:
    one = step(tmp_path, "a")
    worker.run_steps([one], Fake([one]))
    with pytest.raises(KAFError, match="other options"):
        worker.is_done(replace(one, identity="other"))


def test_environment_of_a_step_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOW_LABEL_TEST", "before")
    seen = []
    one = replace(step(tmp_path, "a"), environment={"LOW_LABEL_TEST": "within"})

    def command(words: Sequence[str]) -> None:

        seen.append(os.environ["LOW_LABEL_TEST"])
        Path(one.product).write_text("")

    worker.run_steps([one], command)

    assert (seen, os.environ["LOW_LABEL_TEST"]) == (["within"], "before")
