"""Streams that are closed or know no Unicode, and the exit codes of all commands."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunetv2_kaf import console
from nnunetv2_kaf.errors import KAFError

CODE = """
import sys
from nnunetv2_kaf import console
console.prepare_streams()
console.complain("to stderr \\u2265 \\udcff")
console.say("to stdout \\u2265 \\udcff")
print("a library", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.skipif(os.name == "nt", reason="redirections of a POSIX shell")
@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "| head -c 0", "2>/dev/full"])
@pytest.mark.parametrize("environment", ["", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"])
def test_closed_streams_and_streams_without_unicode(redirection: str, environment: str, tmp_path: Path) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    script = tmp_path / "script.py"
    script.write_text(CODE, encoding="utf-8")
    command = f"{environment} {sys.executable} {script} {redirection}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False, errors="replace"
    )
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    assert done.returncode in (7, 141 if "head" in redirection else 7)


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KAFError("plans.json: found 3"), 2, "kaf-x: error: plans.json: found 3"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "kaf-x: error: /a/b: found No such file"),
        (PermissionError(13, "Permission denied", b"/a\xff"), 2, "Permission denied"),
        (OSError(28, "No space left on device"), 2, "found No space left on device"),
        (MemoryError(), 2, "too little memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "too little memory"),
        (RuntimeError("CUDA out of memory.\nTried to"), 2, "CUDA out of memory. Tried to"),
        (KeyboardInterrupt(), 130, "kaf-x: interrupted; nothing"),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run("kaf-x", fail(error), "nothing") == code
    written = capsys.readouterr().err
    assert words in written
    assert written.count("\n") == 1


def test_a_mistake_in_the_program_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        console.run("kaf-x", fail(RuntimeError("a bug")), "")
    assert console.run("kaf-x", lambda: None, "") == 0


def test_an_empty_path_is_none() -> None:
    assert console.path("a b") == Path("a b")
    for text in ("", "  ", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a path"):
            console.path(text)
