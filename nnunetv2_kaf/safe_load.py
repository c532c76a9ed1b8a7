"""Checkpoints of others, loaded without running code from them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_kaf.errors import KAFError


def load_safely(path: Path, named_by: str = "") -> dict[str, Any]:
    """Load a checkpoint without running code from it.

    Besides tensors and primitives, nnU-Net's checkpoints hold numpy scalars; these, and nothing else, are allowed.

    Args:
        path: of the file.
        named_by: the option that names the file, for messages.

    Raises:
        KAFError: the file is missing, truncated, or holds objects of other classes.
    """
    shown = f"{named_by} {path}".strip()
    if not path.is_file():
        raise KAFError(f"{shown}: the file does not exist. Correct the path.")
    allowed = _numpy_scalars(shown)
    try:
        with allowed:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise many types for damaged files
        raise KAFError(_unreadable(path, shown, error)) from error
    if not isinstance(checkpoint, dict):
        raise KAFError(f"{shown}: found a {type(checkpoint).__name__}, expected a checkpoint (a dict).")
    return checkpoint


def _numpy_scalars(shown: str) -> AbstractContextManager[Any]:
    """Allow numpy scalars in `torch.load`, under the names that numpy 1 and numpy 2 give them."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise KAFError(
            f"{shown}: torch 2.6 or newer is needed to read it safely; found {torch.__version__}. Update it."
        )
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return torch.serialization.safe_globals([*[(scalar, name) for name in names], np.dtype, *dtypes])


def _unreadable(path: Path, shown: str, error: Exception) -> str:
    """Why a file cannot be loaded."""
    try:
        with _numpy_scalars(shown):
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a checkpoint at all
        classes = []
    if classes:
        return (
            f"{shown} holds objects besides tensors, numbers and text ({', '.join(sorted(classes)[:5])}); "
            "loading them could run code of the file, so it is not read. If you trust its origin, load it there and "
            "save its network_weights alone with torch.save({'network_weights': ...}, file)."
        )
    return (
        f"{shown} ({path.stat().st_size} bytes) cannot be read as a checkpoint; it is truncated or of another "
        f"kind ({type(error).__name__}). Copy it again, or name another file."
    )
