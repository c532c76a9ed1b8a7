from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_kaf import files
from nnunetv2_kaf.errors import KAFError


def write(path: Path, text: str) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_full_disk_keeps_the_last_good_file(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    write(path, "good")

    def fill_the_disk() -> None:
        with files.replacing(path, "Do this.") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(KAFError, match=r"could not save .*checkpoint_final\.pth.*Free on that disk: .* GiB.*Do this"):
        fill_the_disk()
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_final.pth"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match=r"could not save .*new\.json"), files.replacing(tmp_path / "new.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_our_own_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KAFError, match=r"^the content is wrong$"), files.replacing(tmp_path / "new.json"):
        raise KAFError("the content is wrong")


def test_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        write(path, text)
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_kill_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write(path, "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, "new and longer")
    assert path.read_text() == "old"
    write(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_sweep_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    seen = []
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            seen.append(temporary)
    old, young = seen
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    files.sweep(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)
    files.sweep(tmp_path, older_than=0)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "file", "folder"]
    files.sweep(tmp_path / "missing")


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"ab" * (1 << 20))
    assert files.file_sha256(path) == hashlib.sha256(b"ab" * (1 << 20)).hexdigest()


def test_versions_name_what_a_result_depends_on() -> None:
    found = files.versions()
    assert found["torch"] == str(torch.__version__)
    assert {"python", "nnunetv2", "nnunetv2-kaf", "dynamic-network-architectures"} <= set(found)
