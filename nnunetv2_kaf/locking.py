"""One run per folder: a lock that names its owner, and ends with it."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nnunetv2_kaf.errors import KAFError

logger = logging.getLogger(__name__)

LOCK = ".kaf.lock"
OWNER = ".kaf.lock.json"
BEAT = 60.0
"""Seconds between two signs of life."""
SILENCE = 600.0
"""Seconds without a sign of life after which an owner on another machine is taken for dead."""


@contextmanager
def folder_lock(folder: Path, remedy: str) -> Iterator[None]:
    """Hold a folder for this process alone.

    The operating system ends a lock with its process, so that one of a killed process is no obstacle. Where a network
    file system does not tell one machine of the locks of another, the signs of life in the owner's file do.

    Args:
        folder: Exists.
        remedy: What else the user can do, a sentence.

    Raises:
        KAFError: Another process holds it (its host and number are named), or it takes no lock file.
    """
    lock, owner = FileLock(str(folder / LOCK)), folder / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise KAFError(f"{folder} is in use by {_named(owner)}. Wait for it, or end it. {remedy}") from None
    except (OSError, NotImplementedError) as error:
        raise KAFError(f"{folder}: the folder cannot be locked or written to ({error}). {remedy}") from error
    stop = threading.Event()
    try:
        _check_other_hosts(folder, owner, remedy)
        with suppress(OSError):  # a full disk: the lock itself holds
            owner.write_text(
                json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}),
                encoding="utf-8",
            )
        threading.Thread(target=_beat, args=(owner, stop), daemon=True, name="lock").start()
        yield
    finally:
        stop.set()
        if _mine(owner):
            with suppress(OSError):
                owner.unlink(missing_ok=True)
        lock.release()


def _check_other_hosts(folder: Path, owner: Path, remedy: str) -> None:
    """Look at who had the folder before.

    Raises:
        KAFError: A process on another machine, a short while ago.
    """
    left = _read(owner)
    if not left:
        return
    silent = time.time() - _changed(owner)
    if left["host"] != socket.gethostname() and silent < SILENCE:
        raise KAFError(
            f"{folder} is in use by {_named(owner)}, whose last sign of life was {silent:.0f} s ago. Wait for it, or "
            f"end it; if it was killed, try again in {(SILENCE - silent) / 60:.0f} min. {remedy}"
        )
    logger.info("%s: the lock of %s is stale, its process has ended.", folder, _named(owner))


def _beat(owner: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(owner)


def _named(owner: Path) -> str:
    left = _read(owner)
    if not left:
        return "another process"
    return f"process {left['pid']} on {left['host']} (since {left.get('since', 'an unknown time')})"


def _mine(owner: Path) -> bool:
    left = _read(owner)
    return left.get("pid") == os.getpid() and left.get("host") == socket.gethostname()


def _read(owner: Path) -> dict[str, object]:
    """What the owner's file says; nothing if it is missing or damaged."""
    try:
        content = json.loads(owner.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and {"pid", "host"} <= content.keys() else {}


def _changed(owner: Path) -> float:
    try:
        return owner.stat().st_mtime
    except OSError:
        return 0.0
