"""Files that are written completely or not at all, and what identifies a result: versions and hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import torch

from nnunetv2_kaf.errors import KAFError


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("nnunetv2-kaf", "nnunetv2", "dynamic-network-architectures"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Args:
        path: file; its folder is made if it is missing.
        write: writes the content to a binary handle.

    Raises:
        KAFError: the file could not be written; a file that was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise KAFError(
            f"could not save {path}: {error}. Free on that disk: {_free_space(path.parent)}. The previous file of this "
            "name, if there was one, is untouched. Free some space or check the permissions, then continue the run."
        ) from error


def atomic_save(obj: object, path: str | Path) -> None:
    """`torch.save` that leaves either the old file or the complete new one.

    Raises:
        KAFError: as `atomic_write`.
    """
    atomic_write(path, lambda handle: torch.save(obj, handle))


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
