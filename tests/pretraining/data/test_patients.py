from __future__ import annotations

import re

import numpy as np
import pytest

from pretraining.config import PretrainConfig
from pretraining.data.patients import group_by_patient, patient_of, split_by_patients

DEFAULT = PretrainConfig().patient_pattern


@pytest.mark.parametrize(
    ("identifier", "pattern", "expected"),
    [
        ("patient001_frame01", DEFAULT, "patient001"),
        ("hippocampus_001", DEFAULT, "hippocampus_001"),  # no second part: every case is a patient
        ("prostate_01_t2", DEFAULT, "prostate_01"),
        ("Sub-7_ED_0", DEFAULT, "Sub-7_ED_0"),  # fullmatch, not search
        ("more-1a2b/patient001_frame01", DEFAULT, "more-1a2b/patient001"),
        ("more_1-1a2b/case", DEFAULT, "more_1-1a2b/case"),  # the source is never matched
        ("more-1a2b/s07_x", r"(s\d+)_.*", "more-1a2b/s07"),  # the pattern need not know of sources
        ("abc", r"(x)?abc", "abc"),  # a group that takes no part
        ("abc", r"(x*)abc", "abc"),  # an empty group
    ],
)
def test_patient_of(identifier: str, pattern: str, expected: str) -> None:
    assert patient_of(identifier, pattern) == expected


def test_groups_are_a_partition_in_order() -> None:
    generator = np.random.default_rng(0)
    cases = [f"{source}p{generator.integers(9)}_f{i}" for i in range(40) for source in ("", "more-1/")]
    groups = group_by_patient(cases, DEFAULT)
    naive: dict[str, list[str]] = {}
    for case in cases:
        naive.setdefault(case[: case.index("_")], []).append(case)
    assert {k: list(v) for k, v in groups.items()} == naive
    assert sorted(c for group in groups.values() for c in group) == sorted(cases)


def test_equal_names_in_two_sources_are_not_grouped_but_left_out_together() -> None:
    cases = ["p1_a", "p2_a", "x-1/p1_b", "x-1/p3_a", "y-2/p1_c"]
    assert group_by_patient(cases, DEFAULT)["p1"] == ("p1_a",)
    kept, left_out = split_by_patients(cases, ["p1_z"], DEFAULT)
    assert kept == ["p2_a", "x-1/p3_a"]
    assert left_out == {"": ["p1_a"], "x-1": ["p1_b"], "y-2": ["p1_c"]}
    assert split_by_patients(cases, [], DEFAULT) == (cases, {})


def test_the_pattern_must_fit_the_whole_case() -> None:
    assert re.fullmatch(DEFAULT, "patient001_frame01_extra-2") is None
    assert patient_of("patient001_frame01_extra-2", DEFAULT) == "patient001_frame01_extra-2"
