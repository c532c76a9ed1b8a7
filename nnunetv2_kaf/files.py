"""Files that are written completely or not at all, and what identifies a result: versions and hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nnunetv2_kaf.errors import KAFError

LEFTOVER_AGE = 3600.0
"""Seconds after which an unfinished file belongs to a process that was killed: a file is written within minutes."""
CONTINUE = "Free some space or check the permissions, then continue the run."


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("nnunetv2-kaf", "nnunetv2", "dynamic-network-architectures"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


@contextmanager
def replacing(path: str | Path, remedy: str = CONTINUE) -> Iterator[Path]:
    """Let the block write a file beside `path`, then flush it to disk and rename it over `path`.

    Args:
        path: The file. Its folder is made if it is missing.
        remedy: What the user can do if it cannot be written; ends the message of the error.

    Yields:
        The file to write. It is gone after the block, also after an error; `sweep` removes what a killed process left.

    Raises:
        KAFError: The file could not be written; a file that was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except KAFError:
        raise
    except (OSError, RuntimeError) as error:
        raise KAFError(
            f"could not save {path}: {error}. Free on that disk: {_free_space(path.parent)}. The previous file of this "
            f"name, if there was one, is untouched. {remedy}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path, older_than: float = LEFTOVER_AGE) -> None:
    """Remove the unfinished files that killed processes left in a folder and the folders in it.

    Args:
        folder: Where `replacing` wrote; it may be missing.
        older_than: Seconds since the last change. Younger files may belong to a process that is writing them.

    Raises:
        OSError: A file cannot be removed.
    """
    for leftover in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - leftover.stat().st_mtime >= older_than:
                leftover.unlink()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"
