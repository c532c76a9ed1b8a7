"""The one place that opens JSON files and torch files: bad content is an error that names the file, and never runs."""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from nnunetv2_kaf.errors import KAFError

MINIMUM_TORCH = (2, 6)
"""Earlier versions could be made to run code in spite of `weights_only=True`."""
_KNOWN = ("torch.", "torch._utils.", "collections.OrderedDict", "numpy.core.multiarray.scalar", "numpy.dtype")


def read_json(path: str | Path, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        fix: What to do if it cannot be read, a sentence.

    Raises:
        KAFError: It cannot be opened or is no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise KAFError(f"{path} is not valid JSON ({error}). {fix}") from error
    except OSError as error:
        raise KAFError(f"{path} cannot be read ({error.strerror or error}). {fix}") from error


def load_safely(
    path: str | Path,
    named_by: str = "",
    what: str = "checkpoint",
    fix: str = "Correct the path, or copy the file again.",
) -> dict[str, Any]:
    """Read a file of `torch.save` without running code from it.

    Besides tensors and primitives, nnU-Net's checkpoints hold numpy scalars; these, and nothing else, are allowed.

    Args:
        path: The file.
        named_by: The option that names it, for messages.
        what: What it should be, e.g. "pretraining checkpoint".
        fix: What to do if it cannot be read, a sentence.

    Returns:
        Its content, a dict, all tensors in main memory.

    Raises:
        KAFError: The file is missing, truncated, of another kind, or holds objects that could run code.
    """
    path = Path(path)
    name = f"{named_by} {path}".strip()
    _check_torch(name)
    try:
        if path.is_dir():
            raise KAFError(f"{name} is a folder; expected a {what}, a file. {fix}")
        if not path.is_file():
            raise KAFError(f"{name} does not exist{' as a file' if path.exists() else ''}. {fix}")
        size = path.stat().st_size
        _check_unpacked(path, size, name, fix)
        with _numpy_scalars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says about odd pickles is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except KAFError:
        raise
    except OSError as error:
        raise KAFError(f"{name} cannot be read ({error.strerror or error}). {fix}") from error
    except Exception as error:  # zipfile, pickle and torch raise many types for damaged files
        unsafe = unsafe_classes(path)
        if unsafe:
            raise KAFError(
                f"{name} is unsafe: it holds objects besides tensors, numbers and text ({', '.join(unsafe[:5])}); "
                "loading them could run code of the file, so it is not read. If you trust its origin, load it there "
                "and save its network_weights alone with torch.save({'network_weights': ...}, file)."
            ) from error
        raise KAFError(
            f"{name} ({size} bytes) cannot be read as a {what}; it is truncated or of another kind "
            f"({type(error).__name__}). {fix}"
        ) from error
    if not isinstance(content, dict):
        raise KAFError(f"{name}: found a {type(content).__name__}, expected a {what} (a dict). {fix}")
    return content


def unsafe_classes(path: Path) -> list[str]:
    """Classes and functions by which a file could run code; none if it is damaged only.

    The pickles of the file are read as a list of instructions, of which none is carried out.
    """
    found: set[str] = set()
    with suppress(Exception):  # a damaged file: what was found up to there
        for pickled in _pickles(path):
            strings: list[str] = []
            for code, argument, _ in pickletools.genops(pickled):
                if code.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return sorted(name for name in found if not name.startswith(_KNOWN))


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """The pickles of a zip archive, or those at the start of a file of the old format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    yield archive.open(name)
        return
    with path.open("rb") as file:
        for _ in range(4):
            yield file


def _check_torch(name: str) -> None:
    """Raise a KAFError if this torch is too old to read files safely."""
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        raise KAFError(
            f"{name} is not read: found torch {torch.__version__}, expected {'.'.join(map(str, MINIMUM_TORCH))} or "
            "newer, which does not run code of a file. Run: pip install --upgrade torch torchvision"
        )


def _check_unpacked(path: Path, size: int, name: str, fix: str) -> None:
    """Raise a KAFError for a file that unpacks to far more than it is (torch never compresses), or has changed."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            # torch itself compares no checksums: a flipped bit would be another weight
            changed = archive.testzip() if unpacked <= size + 2**20 else None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, zlib.error, EOFError, RuntimeError):
        return  # torch says what is wrong with it
    if changed:
        raise KAFError(
            f"{name} is damaged: found the record {changed} with another content than its checksum says, expected the "
            f"file as it was written. {fix}"
        )
    if unpacked > size + 2**20:
        raise KAFError(
            f"{name} is compressed: found {unpacked} bytes of content in {size}, expected an uncompressed file as "
            f"torch.save writes it. It is not read. {fix}"
        )


@contextmanager
def _numpy_scalars() -> Iterator[None]:
    """Allow numpy scalars in `torch.load`, under the names that numpy 1 and numpy 2 give them."""
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    with torch.serialization.safe_globals([*[(scalar, name) for name in names], np.dtype, *dtypes]):
        yield
