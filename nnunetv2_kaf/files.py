"""Files that are written completely or not at all, and what identifies a result: versions and hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunetv2_kaf.errors import KAFError

LEFTOVER_AGE = 3600.0
"""Seconds after which an unfinished file belongs to a process that was killed: a file is written within minutes."""
CONTINUE = "Free some space or check the permissions, then continue the run."


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import torch  # not at the top: whoever only writes a file need not wait for it

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
    temporary = path.with_name(f".{shortened(path.name, 100)}.{os.getpid()}-{threading.get_ident()}.tmp")
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
    """Remove the unfinished files that killed processes of ours left in a folder and the folders in it.

    Only names as `replacing` gives them: a temporary file of somebody else is none of them.

    Args:
        folder: Where `replacing` wrote; it may be missing.
        older_than: Seconds since the last change. Younger files may belong to a process that is writing them.

    Raises:
        OSError: A file cannot be removed.
    """
    for leftover in folder.rglob(".*.tmp"):
        if not re.fullmatch(r"\..+\.\d+-\d+\.tmp", leftover.name):
            continue
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - leftover.stat().st_mtime >= older_than:
                leftover.unlink()


def shortened(name: str, most: int = 160) -> str:
    """A name of at most so many bytes and 17 more: the end of a longer one is replaced by its hash.

    File systems take 255 bytes; what is added to the name of a case must still fit.
    """
    raw = name.encode()
    if len(raw) <= most + 17:
        return name
    return f"{raw[:most].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def append_checksum(path: Path) -> None:
    """Write the SHA-256 of a file at its end: for formats whose readers stop before it."""
    digest = file_sha256(path)
    with path.open("ab") as file:
        file.write(digest.encode())


def has_checksum(path: Path) -> bool:
    """Whether a file is as it was when `append_checksum` closed it.

    Raises:
        OSError: It cannot be read.
    """
    digest, left = hashlib.sha256(), path.stat().st_size - 64
    if left < 0:
        return False
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        return file.read() == digest.hexdigest().encode()


def check_cache(paths: Iterable[Path], threads: int) -> None:
    """Compare the files of a cache with the checksums at their ends.

    Args:
        paths: Written with `append_checksum`.
        threads: Files at a time.

    Raises:
        KAFError: Some are damaged or cannot be read; the command that deletes them is named.
    """
    listed = list(paths)

    def problem(path: Path) -> str:
        try:
            return "" if has_checksum(path) else "its content has changed since it was written (checksum)"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    with ThreadPoolExecutor(max(1, threads)) as pool:
        damaged = {p: why for p, why in zip(listed, pool.map(problem, listed), strict=True) if why}
    if damaged:
        path, why = next(iter(damaged.items()))
        raise KAFError(
            f"{path}: {why}{f', and {len(damaged) - 1} more' if len(damaged) > 1 else ''}; expected a cached file as "
            f"it was written. Delete it and run again, it is made anew: rm -f {shlex.join(map(str, damaged))}"
        )


def _free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"
