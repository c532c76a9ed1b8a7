from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from low_label import config

from nnunetv2_kaf.errors import KAFError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "low_label"
GOOD: dict[str, Any] = {
    "comment": "c",
    "device": "cpu",
    "labelled": [2, "all"],
    "draws": 1,
    "epochs": 2,
    "iterations": 3,
    "training": {"warmup_epochs": 1, "initial_lr": 0.01},
    "pretraining": {"epochs": 4},
    "tasks": {"flat": {"data": "D", "configuration": "2d"}, "deep": {"data": "D", "configuration": "3d_fullres"}},
    "arms": {
        "plain": {"trainer": "plain"},
        "kaf": {"trainer": "kaf", "pretraining": {"weight_local": 0.0}, "training": {"initial_lr": 0.1}},
        "primus": {"trainer": "primus", "tasks": ["deep"]},
    },
}


def load(tmp_path: Path, change: Callable[[dict[str, Any]], object] = lambda block: None) -> config.Study:
    content = copy.deepcopy(GOOD)
    change(content)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(content))
    return config.load(file)


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.json")))
def test_committed_configs_are_valid_and_have_the_baseline(name: str) -> None:
    study = config.load(FOLDER / f"{name}.json")
    assert study.name == name
    assert study.baseline in [arm.name for arm in study.arms]
    assert set(study.draws) == set(study.labelled)


def test_common_values_are_merged_and_an_arms_own_win(tmp_path: Path) -> None:
    study = load(tmp_path)
    plain, kaf, primus = study.arms
    assert plain.training == {"warmup_epochs": 1, "initial_lr": 0.01}
    assert kaf.training == {"warmup_epochs": 1, "initial_lr": 0.1}
    assert kaf.pretraining == {"preset": "kaf", "epochs": 4, "weight_local": 0.0}
    assert plain.pretraining is None
    assert (plain.network, kaf.network) == ("plain", "kaf")
    assert (primus.tasks, plain.tasks) == (("deep",), ("flat", "deep"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("draws"), "draws: missing"),
        (lambda b: b.update(draws={"2": 1}), r"draws: found the keys \['2'\], expected \["),
        (lambda b: b["tasks"]["flat"].update(patch_size=[64]), r"tasks\.flat\.patch_size: found \[64\]"),
        (
            lambda b: b["arms"]["plain"].update(training={"teacher_decay": 0.9}),
            r"arms\.plain\.training\.teacher_decay: found with trainer 'plain'",
        ),
        (
            lambda b: b["arms"]["kaf"].update(trainer="kaf_semi", training={"predict_with": "both"}),
            r"arms\.kaf\.training\.predict_with: .*student or teacher",
        ),
        (lambda b: b.update(drawz=1), "drawz: unknown key"),
        (lambda b: b.update(draws=True), "draws: found True, expected a whole number of at least 1"),
        (lambda b: b.update(labelled=[2, 2]), r"labelled: found \[2, 2\]"),
        (lambda b: b.update(labelled=[6, 2]), "labelled: .* ascending"),
        (lambda b: b.update(arms={}), "arms: found"),
        (lambda b: b["tasks"]["flat"].update(batch_size=1), r"tasks\.flat\.batch_size: found 1"),
        (lambda b: b["tasks"]["flat"].update(patient_pattern="("), r"tasks\.flat\.patient_pattern"),
        (lambda b: b["arms"]["plain"].update(trainer="unet"), r"arms\.plain\.trainer: found 'unet'"),
        (lambda b: b["arms"]["plain"].update(kaf={"num_blocks": 1}), r"arms\.plain\.kaf: found with trainer 'plain'"),
        (lambda b: b["arms"]["kaf"].update(kaf={"blocks": 1}), r"arms\.kaf\.kaf: .*blocks"),
        (lambda b: b["arms"]["kaf"]["pretraining"].update(epoch=1), r"arms\.kaf\.pretraining: .*epoch"),
        (lambda b: b["arms"]["kaf"]["pretraining"].update(seed=1), r"arms\.kaf\.pretraining\.seed"),
        (lambda b: b["arms"]["plain"].update(pretraining={}), r"arms\.plain\.pretraining: .*--network plain"),
        (lambda b: b["arms"]["kaf"]["training"].update(lr=1), r"arms\.kaf\.training\.lr: unknown key"),
        (lambda b: b["training"].update(warmup_epochs=0.5), r"training\.warmup_epochs: found 0\.5"),
        (lambda b: b["arms"]["primus"].update(tasks=None), r"arms\.primus\.trainer: .*2d"),
        (lambda b: b["arms"]["primus"].update(tasks=["wide"]), r"arms\.primus\.tasks: .*wide"),
        (lambda b: b["arms"]["kaf"].update(labelled=[6]), r"arms\.kaf\.labelled: found \[6\], expected some of \[2, "),
        (lambda b: b["arms"]["kaf"].update(labelled=[]), r"arms\.kaf\.labelled: found \[\]"),
        (lambda b: b.update(baseline="kafka"), "baseline: found 'kafka', expected one of plain, kaf, primus"),
        (lambda b: b["arms"].update({"a b": {"trainer": "plain"}}), r"arms\.a b: expected a name"),
    ],
)
def test_a_mistake_is_reported_with_its_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(KAFError, match=rf"study\.json: {message}"):
        load(tmp_path, change)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match=r"--config .*missing\.json"):
        config.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(KAFError, match=r"broken\.json is not valid JSON"):
        config.load(tmp_path / "broken.json")
