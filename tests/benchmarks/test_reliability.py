"""Properties of every reader, by hypothesis: whatever a file holds, nothing is raised but our error."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import faults, fuzz, mutations, page
from reliability.readers import Files, Reader

from nnunetv2_kaf.errors import KAFError

EXAMPLES = 25
NAMES = (
    "plans", "plans, as bytes", "dataset.json", "splits_final.json", "kaf block", "options of a run",
    "checkpoint_final.pth", "checkpoint_final.pth, as bytes", "checkpoint_latest.pth",
    "checkpoint_latest.pth, as bytes", "checkpoint of nnU-Net (--init)", "checkpoint of nnssl (--init)",
    "model folder", "safetensors (--init)", "cached keypoints, as bytes", "cached keypoints with a checksum",
    "owner of a folder",
)  # fmt: skip


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return {reader.name: reader for reader in Files(tmp_path_factory.mktemp("files")).readers()}


def test_every_reader_has_its_property(readers: dict[str, Reader]) -> None:
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_file_is_our_error_or_none(name: str, readers: dict[str, Reader]) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(rng=st.randoms(use_true_random=False))
    def holds(rng: random.Random) -> None:
        with suppress(KAFError):
            readers[name].attempt(rng)

    holds()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, database=None)
@given(content=JSON, seed=st.integers(0, 2**32))
def test_mutations_leave_the_original_alone(content: Any, seed: int) -> None:
    before = repr(content)
    mutations.mutated(content, random.Random(seed))
    assert repr(content) == before
    assert repr(mutations.mutated(content, random.Random(seed))) == repr(
        mutations.mutated(content, random.Random(seed))
    ), "the seed repeats it"


@given(data=st.binary(max_size=50), seed=st.integers(0, 2**32))
def test_damage_is_repeatable(data: bytes, seed: int) -> None:
    assert mutations.damaged(data, random.Random(seed)) == mutations.damaged(data, random.Random(seed))


def test_fuzzing_counts_what_it_tried_and_finds_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def odd(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.3:
            raise KAFError("refused")
        if kind < 0.6:
            raise KeyError("a mistake")

    monkeypatch.setattr(fuzz.Files, "readers", lambda self: [Reader("odd", odd)])
    found = fuzz.fuzz(0.0005, 0)
    counts = found["readers"]["odd"]
    assert set(counts) == {"refused", "accepted", "failed"}
    assert len(found["failures"]) == counts["failed"]
    failure = found["failures"][0]
    assert "KeyError" in failure["error"]
    with pytest.raises(KeyError):
        odd(random.Random(failure["seed"]))


def test_the_page_is_written_from_the_figures(tmp_path: Path) -> None:
    counts = {"plans": {"refused": 3, "accepted": 1}, "splits": {"refused": 2, "failed": 1}}
    fuzzing = {
        "minutes": 10, "first_seed": 0, "readers": counts, "machine": {"processor": "P", "cores": 2},
        "failures": [{"reader": "splits", "seed": 4, "error": "KeyError: x"}], "versions": {"torch": "2.6"},
    }  # fmt: skip
    faulty = {
        "faults": {"killed": {"what": "kill -9", "tries": 20, "passed": 19, "failures": ["history differs"]}},
        "machine": {"processor": "P", "cores": 2}, "versions": {"torch": "2.6"},
    }  # fmt: skip
    for name, content in (("fuzz", fuzzing), ("faults", faulty)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = page.page(tmp_path)
    assert "7 wrong files" in text
    assert "| plans | 4 | 3 | 1 | 0 |" in text
    assert "| splits | 3 | 2 | 0 | 1 |" in text
    assert "| kill -9 | 20 | 19 |" in text
    assert "history differs" in text


def test_the_page_in_the_documentation_is_the_one_of_the_figures() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(page.RESULTS)


def test_a_fault_that_breaks_something_is_counted() -> None:
    def broken(work: faults.Work, seed: int) -> str:
        return "" if seed == 0 else "history differs"

    found = faults.repeat(faults.Fault("broken", "what", 3, broken), faults.Work(Path("/nowhere"), {}))
    assert found == {
        "what": "what",
        "tries": 3,
        "passed": 1,
        "failures": ["try 1: history differs", "try 2: history differs"],
    }
