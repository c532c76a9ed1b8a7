"""Two processes never write to one folder, and a lock of a dead one is no obstacle."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_kaf.errors import KAFError
from nnunetv2_kaf.locking import LOCK, OWNER, SILENCE, folder_lock

HOLD = """
import sys, pathlib, time
from nnunetv2_kaf.locking import folder_lock
with folder_lock(pathlib.Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_its_lock_ends_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = hold(tmp_path)
    try:
        with (
            pytest.raises(KAFError, match=rf"in use by process {process.pid} on {socket.gethostname()}.*--output"),
            folder_lock(tmp_path, "Or choose --output."),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == process.pid, "a killed process cleans nothing"
    with caplog.at_level(logging.INFO, logger="nnunetv2_kaf"), folder_lock(tmp_path, ""):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert f"the lock of process {process.pid}" in caplog.text
    assert "stale" in caplog.text
    assert not (tmp_path / OWNER).exists()


def test_it_is_free_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), folder_lock(tmp_path, ""):
            raise RuntimeError("inside")


def test_signs_of_life_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "today"}))
    with pytest.raises(KAFError, match=r"process 7 on elsewhere.*sign of life.*try again"), folder_lock(tmp_path, ""):
        pass
    old = (tmp_path / OWNER).stat().st_mtime - 2 * SILENCE
    os.utime(tmp_path / OWNER, (old, old))
    with folder_lock(tmp_path, ""):
        assert json.loads((tmp_path / OWNER).read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"pid": 3}', "[" * 10**5])
def test_a_damaged_owner_file_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(content)
    with folder_lock(tmp_path, ""):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_folder_that_takes_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(KAFError, match="cannot be locked"), folder_lock(tmp_path, "Choose another."):
        pass
