from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from low_label import evidence, in_short, report, targets, told
from low_label.layout import RESULTS

from nnunetv2_kaf.errors import KAFError
from pretraining.config import PretrainConfig

PATIENTS = ["p1", "p2", "p3", "p4", "p5"]


def document(arm: str, labelled: int | str, draw: int, dice: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "study": "cpu",
        "task": "heart",
        "on": "validation",
        "arm": arm,
        "definition": {
            "trainer": "kaf_semi" if arm == "kaf_semi" else "kaf",
            "pretraining": {"preset": "kaf"} if arm in ("kaf_all", "kaf_all_2", "kaf_semi") else None,
            "kaf": {},
        },
        "labelled": labelled,
        "draw": draw,
        "patients": ["a", "b"],
        "split_sha256": "s",
        "setting_sha256": "t",
        "setting": {
            "epochs": 4,
            "iterations": 25,
            "mirror_predictions": False,
            "task": {
                "data": "Dataset001_Heart",
                "configuration": "2d",
                "batch_size": 9,
                "downsample": 2,
            },
        },
        "commit": "abc",
        "machine": {"processor": "P", "cores": 2},
        "versions": {"torch": "1", "nnunetv2": "2", "nnunetv2-kaf": "3"},
        "cost": {
            "training_seconds": 10.0 + draw,
            "pretraining_seconds": None if arm == "kaf" else 0.0,
            "pretraining_iterations": 30 if arm == "kaf" else 0,
        },
        "patient_of": {f"{p}_1": p for p in PATIENTS},
        "cases": {f"{p}_1": {"1": {"dice": d, "hd95": 10 * d}} for p, d in zip(PATIENTS, dice, strict=True)},
        **changes,
    }


def write(folder: Path, *documents: dict[str, Any]) -> Path:
    for one in documents:
        file = folder / one["study"] / one["task"] / "runs" / one["on"]
        file.mkdir(parents=True, exist_ok=True)
        (file / f"{one['arm']}_M{one['labelled']}_draw{one['draw']}.json").write_text(json.dumps(one))
    return folder


BASE = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write(
        tmp_path / "results",
        document("kaf", 2, 0, [d + 0.2 for d in BASE]),
        document("kaf", 2, 1, [d + 0.4 for d in BASE]),
        document("plain", 2, 0, [d + 0.1 for d in BASE]),
        document("plain", 2, 1, BASE),
        document("plain", "all", 0, BASE),
        document("plain", 10, 0, BASE),
    )


def test_cells_average_draws_and_pair_with_the_baseline(results: Path) -> None:
    found = report.load(results / "cpu" / "heart", "validation", ["plain", "kaf"])
    assert found is not None
    cells = found.cells()
    assert [(c.labelled, c.arm) for c in cells] == [(2, "plain"), (2, "kaf"), (10, "plain"), ("all", "plain")]
    plain, kaf = cells[:2]
    assert plain.metrics["dice"].value == pytest.approx(0.35)
    assert kaf.metrics["dice"].value == pytest.approx(0.6)
    assert kaf.spread["dice"] == pytest.approx((0.5, 0.7))
    # 0.1 in the first draw, 0.4 in the second, for every patient: a resample has either draw twice, or both
    difference = kaf.differences["dice"]
    assert (difference.mean.value, difference.mean.low, difference.mean.high) == pytest.approx((0.25, 0.1, 0.4))
    assert plain.differences == {}
    assert plain.cost == {"training_seconds": 10.5, "pretraining_seconds": 0.0, "pretraining_iterations": 0.0}
    assert kaf.cost["pretraining_seconds"] is None


def test_only_draws_that_both_have_are_paired(results: Path) -> None:
    write(results, document("half", 2, 1, BASE))
    found = report.load(results / "cpu" / "heart", "validation")
    assert found is not None
    half = next(cell for cell in found.cells() if cell.arm == "half")
    assert half.differences["dice"].mean.value == pytest.approx(0.0)
    assert half.differences["dice"].p == 1.0


def test_table_has_the_numbers(results: Path) -> None:
    found = report.load(results / "cpu" / "heart", "validation", ["plain", "kaf"])
    assert found is not None
    lines = report.table(found.cells(), "plain").splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 2 | `plain` | 2 | 0.3500 (")
    assert "| 0.5000, 0.7000 | +0.2500 (+0.1000 to +0.4000) | 0.0625 |" in lines[3]
    assert lines[3].endswith("| 10 | unknown |")


@pytest.mark.parametrize("key", ["split_sha256", "setting_sha256"])
def test_different_settings_never_share_a_table(results: Path, key: str) -> None:
    write(results, document("kaf", 2, 0, BASE, **{key: "other"}))
    with pytest.raises(KAFError, match=rf"different values of {key} in .*kaf_M2_draw0\.json"):
        report.load(results / "cpu" / "heart", "validation")


def test_evidence_shows_each_study_by_itself_and_the_test_if_there_is_one(results: Path, tmp_path: Path) -> None:
    write(results, document("plain", 2, 0, BASE, study="gpu", on="validation"))
    write(results, document("plain", 2, 0, [0.9] * 5, study="gpu", on="test"))
    page = tmp_path / "docs" / "evidence.md"
    evidence.write_evidence(results, page)
    text = page.read_text()
    _, _, gpu, cpu, *unmeasured = text.split("## ")[1:]
    assert all("Not measured yet." in part for part in unmeasured)
    assert cpu.startswith("cpu: heart")
    assert "**not a test result**" in cpu
    assert "100 iterations with a batch of 9, pretraining of 30 iterations, last checkpoint" in cpu
    assert "averaged over 2 x 2 voxels" in cpu
    assert gpu.startswith("gpu: heart")
    assert "5 test patients (5 cases), used once" in gpu
    assert "0.9000" in gpu
    assert "0.9000" not in cpu
    for link in ("cpu/heart/validation_dice.png", "gpu/heart/test_hd95.png", "gpu/heart/validation.md"):
        assert f"(../results/{link})" in text
        assert (results / link).stat().st_size > 0
    before = text
    evidence.write_evidence(results, page)
    assert page.read_text() == before


def test_a_conclusion_stands_below_test_results_only(results: Path) -> None:
    write(results, document("plain", 2, 0, BASE, on="test"))
    study = replace(told.told("smoke"), conclusion="What it shows.")
    for on in ("validation", "test"):
        folder = results / "cpu" / "heart"
        found = report.load(folder, on)
        assert found is not None
        assert ("What it shows." in evidence.section(told.Found(folder, study, found), Path())) is (on == "test")


def test_pretrainings_are_compared_with_pretrainings_alone(tmp_path: Path) -> None:
    for arm, gain in (("plain", 0.0), ("kaf_all", 0.2), ("kaf_all_2", 0.1), ("kaf_semi", 0.4)):
        write(tmp_path, document(arm, 2, 0, [d + gain for d in BASE], on="test"))
    (task,) = told.found(tmp_path)
    text = evidence.section(task, Path())
    assert "above every other pretrained arm, 2 labelled | +0.1000 to the best of them, `kaf_all_2` | yes |" in text


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    evidence.write_evidence(tmp_path / "nothing", tmp_path / "evidence.md")
    assert "Not measured yet." in (tmp_path / "evidence.md").read_text()


def test_trials_are_compared_with_their_baseline_and_say_what_they_change(tmp_path: Path) -> None:
    own = {"pretraining": {"epochs": 5}, "kaf": {}, "training": {"initial_lr": 0.1}, "planner": "P"}
    longer = {**own, "pretraining": {"epochs": 9}, "kaf": {"num_blocks": 1}}
    scratch = {**own, "pretraining": None, "planner": "Q"}
    write(
        tmp_path,
        document("kaf_all", 2, 0, BASE, definition=own),
        document("longer", 2, 0, [d + 0.1 for d in BASE], definition=longer),
        document("scratch", 2, 0, BASE, definition=scratch),
    )
    found = report.load(tmp_path / "cpu" / "heart", "validation", (), "kaf_all")
    assert found is not None
    header, _, first, second, third = report.trials(found, {"longer": "kept"}).splitlines()
    assert "difference to kaf_all" in header
    assert first.startswith("| 2 | `kaf_all` | the baseline | 1 | 0.3000 (")
    assert "| pretraining `epochs`: 5 to 9; kaf `num_blocks`: default to 1 | 1 |" in second
    assert "| +0.1000 (+0.1000 to +0.1000) | 0.0625 | kept |" in second
    assert "| pretraining: some to none; planner: P to Q | 1 |" in third
    assert third.endswith("| 1 |  |")


def test_targets_are_held_against_the_means(tmp_path: Path) -> None:
    write(
        tmp_path,
        document("plain", 2, 0, BASE),
        document("kaf_all", 2, 0, [d + 0.05 for d in BASE]),
        document("kaf_all_but_one", 2, 0, [d + 0.06 for d in BASE]),
        document("kaf_scratch", 2, 0, [d - 0.01 for d in BASE]),
        document("semi", 2, 0, [d + 0.07 for d in BASE]),
        document("plain", "all", 0, BASE),
        document("kaf_all", "all", 0, [d - 0.002 for d in BASE]),
    )
    found = report.load(tmp_path / "cpu" / "heart", "validation")
    assert found is not None
    lines = targets.table(found.cells(), ["kaf_all", "kaf_all_but_one"]).splitlines()[2:]
    assert lines == [
        "| `kaf_all` minus `plain`, 2 labelled: at least +0.030 | +0.0500 | yes |",
        "| `kaf_all` minus `plain`, 6 labelled: at least +0.015 | not measured | not measured |",
        "| `kaf_all` minus `plain`, all labelled: at least -0.003 | -0.0020 | yes |",
        "| `kaf_all` above every other pretrained arm, 2 labelled | -0.0100 to the best of them, `kaf_all_but_one` "
        "| **no** |",
        "| `kaf_all` above every other pretrained arm, 6 labelled | not measured | not measured |",
        "| `semi` minus `plain`, 2 labelled: at least +0.050 | +0.0700 | yes |",
        "| HD95 of `semi` below that of `plain`, 2 labelled | +0.70 mm | **no** |",
        "| `kaf_semi` not below `semi`, 2 labelled | not measured | not measured |",
        "| `semi` minus `plain`, 6 labelled: at least +0.030 | not measured | not measured |",
        "| HD95 of `semi` below that of `plain`, 6 labelled | not measured | not measured |",
        "| `kaf_semi` not below `semi`, 6 labelled | not measured | not measured |",
        "| `kaf_scratch` not below `plain`, 2 labelled | -0.0100 | **no** |",
        "| `kaf_scratch` not below `plain`, all labelled | not measured | not measured |",
    ]


def test_acdc_has_a_larger_target(tmp_path: Path) -> None:
    write(tmp_path, document("plain", 2, 0, BASE), document("semi", 2, 0, [d + 0.07 for d in BASE]))
    found = report.load(tmp_path / "cpu" / "heart", "validation")
    assert found is not None
    line = "| `semi` minus `plain`, 2 labelled: at least +0.080 | +0.0700 | **no** |"
    assert line in targets.table(found.cells(), [], "ACDC").splitlines()


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    assert evidence.EVIDENCE.read_text() == evidence.page(RESULTS, evidence.EVIDENCE)


def test_the_readme_has_the_results_of_all_studies(tmp_path: Path) -> None:
    table = in_short.table(told.found(RESULTS))
    assert len(table.splitlines()) > 2
    assert f"{evidence.BEGIN}\n\n{table}\n\n{evidence.END}" in evidence.README.read_text()
    copy = tmp_path / "README.md"
    copy.write_text(f"a\n{evidence.BEGIN}\nold\n{evidence.END}\nb\n")
    evidence.write_readme(RESULTS, copy)
    assert copy.read_text() == f"a\n{evidence.BEGIN}\n\n{table}\n\n{evidence.END}\nb\n"
    copy.write_text("no marks")
    with pytest.raises(KAFError, match="expected one line"):
        evidence.write_readme(RESULTS, copy)


def test_the_readme_shows_what_is_compared_only(tmp_path: Path) -> None:
    write(
        tmp_path,
        *(document("plain", 2, k, BASE) for k in range(5)),
        *(document("kaf", 2, k, [d + 0.3 for d in BASE]) for k in range(5)),
        document("semi", 2, 0, [d + e for d, e in zip(BASE, (0.1, -0.1, 0.1, -0.1, 0.1), strict=True)]),
        document("plain", "all", 0, BASE),
    )
    found = report.load(tmp_path / "cpu" / "heart", "validation")
    assert found is not None
    lines = report.summary({"Heart": found.cells()}, ["plain", "semi", "kaf_semi", "kaf"]).splitlines()
    assert lines[0] == "| data | labelled patients | `plain` | `semi` | `kaf` |"
    assert lines[2:] == ["| Heart | 2 | 0.3000 | 0.3200 (+0.0200) | 0.6000 (**+0.3000**) |"]


def test_only_differences_of_enough_draws_are_clear(tmp_path: Path) -> None:
    for study, draws in (("few", 3), ("enough", 5)):
        arms = (("plain", BASE), ("semi", [d + 0.1 for d in BASE]))
        write(tmp_path, *(document(arm, 2, k, dice, study=study) for arm, dice in arms for k in range(draws)))
    enough, few = in_short.table(told.found(tmp_path)).splitlines()[2:]
    assert ("(**+0.1000**)" in enough, "(+0.1000)" in few) == (True, True)
    head = in_short.sentences(told.found(tmp_path)).removeprefix(in_short.IN_SHORT)
    assert head.count("3 draws, too few to be sure") == 1


def test_the_readme_is_about_few_labels(tmp_path: Path) -> None:
    write(tmp_path, *(document(arm, "all", 0, BASE) for arm in ("plain", "semi")))
    assert len(in_short.table(told.found(tmp_path)).splitlines()) == 2


def test_the_page_names_the_code_of_the_trainings(tmp_path: Path) -> None:
    for on, commits in (("validation", ("a" * 40, "b" * 40 + "-dirty")), ("test", ("c" * 40, "c" * 40))):
        arms = zip(("plain", "semi"), commits, strict=True)
        write(tmp_path, *(document(arm, 2, 0, BASE, on=on, commit=commit) for arm, commit in arms))
    page = evidence.page(tmp_path, tmp_path / "page.md")
    changed = f"{'b' * 10} with changes that are not in it"
    assert f"code of {'a' * 10} (`plain`), {changed} (`semi`), measured with {'c' * 10}." in page


def test_the_readme_prefers_test_patients(tmp_path: Path) -> None:
    for study, on, label in (("a", "validation", "(`a`), 5 validation patients |"), ("b", "test", "(`b`) |")):
        write(tmp_path, *(document(arm, 2, 0, BASE, study=study, on=on) for arm in ("plain", "semi")))
        (line,) = in_short.table(told.found(tmp_path)).splitlines()[2:]
        assert label in line


def test_the_readme_shows_all_studies_of_a_dataset(tmp_path: Path) -> None:
    for study in ("a", "b"):
        write(tmp_path, document("plain", 2, 0, BASE, study=study), document("semi", 2, 0, BASE, study=study))
    lines = in_short.table(told.found(tmp_path)).splitlines()[2:]
    assert ["(`a`)" in line for line in lines] == [True, False]
    assert ["(`b`)" in line for line in lines] == [False, True]


def test_the_page_begins_with_sentences_whose_numbers_are_those_of_the_table(tmp_path: Path) -> None:
    write(
        tmp_path,
        document("plain", 2, 0, BASE),
        document("semi", 2, 0, [d + 0.1 for d in BASE]),
        document("kaf_all", 2, 0, [0.31] * 5),
    )
    found = in_short.sentences(told.found(tmp_path)).removeprefix(in_short.IN_SHORT)
    (line,) = [line for line in found.splitlines() if line.startswith("- ")]
    once = "one training of each (chance in it is not part of the intervals)"
    assert line.startswith(f"- 2 labelled patients, {once}: plain nnU-Net 0.300; with unlabelled scans")
    assert "+0.100 (+0.100 to +0.100); KAF, pretrained +0.010 (" in line
    assert line.count("not clearly different") == 1
    assert "5 validation patients (`cpu`), mean Dice:" in in_short.sentences(told.found(tmp_path))


def test_an_arm_alone_makes_no_sentence(tmp_path: Path) -> None:
    write(tmp_path, document("plain", 2, 0, BASE))
    assert in_short.sentences(told.found(tmp_path)) == in_short.IN_SHORT


def test_readme_and_head_leave_out_an_earlier_form_of_a_trainer(tmp_path: Path) -> None:
    arms = ("plain", "semi", "kaf_all")
    for study in ("acdc_cpu", "another"):  # the config of the first one marks its arm `semi`
        write(tmp_path, *(document(arm, 2, 0, BASE, study=study) for arm in arms))
    write(tmp_path, *(document(arm, 2, 0, BASE, study="acdc_semi") for arm in arms[:2]))
    _, _, *lines = in_short.table(told.found(tmp_path)).splitlines()
    assert ["(`acdc_cpu`)" in line for line in lines] == [True, False]  # of acdc_semi nothing of today is left
    assert [line.count("+0.0000") for line in lines] == [1, 2]
    head = in_short.sentences(told.found(tmp_path)).removeprefix(in_short.IN_SHORT)
    assert "acdc_semi" not in head
    earlier, today = (line for line in head.splitlines() if line[:2] == "- ")
    assert ("nnUNetTrainerSemi" in earlier, "nnUNetTrainerSemi" in today) == (False, True)
    assert "KAF, pretrained +0.000" in earlier
    assert "## acdc_semi: heart" in evidence.page(tmp_path, tmp_path / "page.md")


def test_the_head_tells_of_test_patients_once_there_are_any(tmp_path: Path) -> None:
    for study, on in (("a", "validation"), ("b", "test")):
        write(tmp_path, *(document(arm, 2, 0, BASE, study=study, on=on) for arm in ("plain", "semi")))
    head = in_short.sentences(told.found(tmp_path))
    assert ("`a`" in head, "5 test patients (`b`)" in head) == (False, True)


def test_studies_with_a_test_come_first(tmp_path: Path) -> None:
    write(tmp_path, document("plain", 2, 0, BASE, study="a"), document("plain", 2, 0, BASE, study="b", on="test"))
    page = evidence.page(tmp_path, tmp_path / "page.md")
    assert page.index("## b: heart") < page.index("## a: heart")


def test_curves_are_held_against_collapse(tmp_path: Path) -> None:
    folder = tmp_path / "pretraining"
    folder.mkdir()
    start = {"uniformity": -2.5, "alignment": 1.2, "recall_at_1": 0.1}
    end = {"uniformity": -1.5, "alignment": 0.4, "recall_at_1": 0.5, "bottleneck": 1.25, "local": 2.0}
    kept = {"arm": "kaf_all", "network": "kaf", "options": {"batch_size": 8}, "history": [start, end]}
    (folder / "one.json").write_text(json.dumps(kept))
    row = evidence.curves(tmp_path).splitlines()[2]
    assert "bottleneck 1.25 of 2.71<br>local 2.00" in row
    assert "| -2.50 to -1.50 | 1.20 to 0.40 | 0.10 to 0.50 |" in row
    assert evidence.curves(tmp_path / "nothing") == ""


def test_no_other_objectives_are_clearly_better_than_the_default_ones() -> None:
    """The weights of `kaf_all` are those of the defaults; a trial that clearly wins on two tasks would replace them."""
    folder = RESULTS / "acdc_objectives" / "acdc_2d"
    study = told.told(folder.parent.name)
    found = report.load(folder, "validation", study.arms, study.baseline)
    assert found is not None
    weights = {name: getattr(PretrainConfig(), name) for name in ("weight_local", "weight_transport")}
    own = {run["arm"]: run["definition"]["pretraining"] for run in found.runs}
    assert {name: own["kaf_all"][name] for name in weights} == weights
    paper = PretrainConfig.from_preset("paper", {})
    assert {name: own["kaf_paper_weights"][name] for name in weights} == {n: getattr(paper, n) for n in weights}
    cells = [cell for cell in found.cells() if cell.arm != study.baseline]
    assert cells
    assert not [cell.arm for cell in cells if cell.differences["dice"].mean.low > 0]
