import json

import pytest

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.splits import (
    PATIENT_PATTERN,
    cases_of_no_fold,
    check_fold,
    leave_one_patient_out,
    patient_of_case,
    split_few_cases,
)

HEARTS = ["patient007_frame01", "patient007_frame09", "patient012_frame01", "patient012_frame11"]


def test_a_fold_leaves_out_a_patient_and_not_a_file():
    splits = leave_one_patient_out(reversed(HEARTS))
    assert splits == [
        {"train": HEARTS[2:], "val": HEARTS[:2]},
        {"train": HEARTS[:2], "val": HEARTS[2:]},
    ]
    for split in leave_one_patient_out(["a", "b", "c"]):
        assert sorted(split["train"] + split["val"]) == ["a", "b", "c"]
        assert len(split["val"]) == 1


def test_names_that_do_not_fit_are_patients_of_their_own():
    assert patient_of_case("patient007_frame01", PATIENT_PATTERN) == "patient007"
    assert patient_of_case("liver_12") == "liver_12"


def test_the_split_is_written_once_and_an_existing_one_wins(tmp_path):
    message = split_few_cases(tmp_path, HEARTS)
    assert message is not None
    assert "2 folds" in message
    file = tmp_path / "splits_final.json"
    assert json.loads(file.read_text()) == leave_one_patient_out(HEARTS)
    assert split_few_cases(tmp_path, HEARTS) is None
    file.write_text("[]")
    assert split_few_cases(tmp_path, HEARTS) is None
    assert file.read_text() == "[]"


def test_five_cases_are_left_to_nnunet(tmp_path):
    assert split_few_cases(tmp_path, ["a", "b", "c", "d", "e"]) is None
    assert not (tmp_path / "splits_final.json").exists()


def test_one_patient_cannot_be_split(tmp_path):
    with pytest.raises(KAFError, match=r"2 case\(s\) of one patient \(patient007\).*fold 'all'"):
        split_few_cases(tmp_path, HEARTS[:2])
    assert not list(tmp_path.iterdir())


def test_a_fold_beyond_the_patients_is_an_error_where_the_split_is_ours(tmp_path):
    split_few_cases(tmp_path, HEARTS)
    check_fold(tmp_path, HEARTS, 1)
    with pytest.raises(KAFError, match=r"fold 2: .* has 2 folds.*from 0 to 1"):
        check_fold(tmp_path, HEARTS, 2)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": HEARTS[:1], "val": HEARTS[1:]}]))
    check_fold(tmp_path, HEARTS, 2)  # the user's own split: nnU-Net's rule for further folds holds


@pytest.mark.parametrize("more", [["patient020_frame01"], [f"patient{i}_frame01" for i in range(100, 106)]])
def test_cases_that_came_after_our_split_are_named(tmp_path, more):
    split_few_cases(tmp_path, HEARTS)
    assert cases_of_no_fold(tmp_path, HEARTS) is None
    message = cases_of_no_fold(tmp_path, HEARTS + more)
    assert message.startswith(f"{len(more)} case(s) are in no fold of {tmp_path / 'splits_final.json'}")
    assert more[0] in message
    # a split of the user's own may leave cases out
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": HEARTS[:2], "val": HEARTS[2:]}]))
    assert cases_of_no_fold(tmp_path, HEARTS + more) is None
