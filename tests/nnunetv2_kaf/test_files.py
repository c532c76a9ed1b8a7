from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_kaf import files
from nnunetv2_kaf.errors import KAFError


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_full_disk_keeps_the_last_good_file(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint_final.pth"
    files.atomic_save({"a": 1}, checkpoint)
    before = checkpoint.read_bytes()

    def full_disk(obj: object, handle: Any) -> None:
        handle.write(b"half")
        raise error

    monkeypatch.setattr(files.torch, "save", full_disk)
    with pytest.raises(KAFError, match=r"could not save .*checkpoint_final\.pth.*Free on that disk: .* GiB"):
        files.atomic_save({}, checkpoint)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint_final.pth"]


def test_atomic_save_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.pth"
    for value in (1, 2):
        files.atomic_save({"value": torch.tensor(value)}, path)
        assert int(torch.load(path, weights_only=True)["value"]) == value
    assert [p.name for p in path.parent.iterdir()] == ["file.pth"]


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"ab" * (1 << 20))
    assert files.file_sha256(path) == hashlib.sha256(b"ab" * (1 << 20)).hexdigest()


def test_versions_name_what_a_result_depends_on() -> None:
    found = files.versions()
    assert found["torch"] == str(torch.__version__)
    assert {"python", "nnunetv2", "nnunetv2-kaf", "dynamic-network-architectures"} <= set(found)


def test_a_kill_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    files.atomic_write(path, lambda handle: handle.write(b"old"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            files.atomic_write(path, lambda handle: handle.write(b"new and longer"))
    assert path.read_text() == "old"
    files.atomic_write(path, lambda handle: handle.write(b"new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
