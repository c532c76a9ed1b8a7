"""Checkpoints on the Hugging Face hub, by the optional package huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from nnunetv2_kaf.errors import KAFError, one_line
from pretraining.exchange.sources import CHECKPOINT, CONFIG, PLAN

SCHEME = "hf://"


def fetched(place: str) -> Path:
    """Download a repository in the layout of nnssl (three files), or take it from the cache.

    Args:
        place: `hf://owner/name` or `hf://owner/name@revision`.

    Returns:
        The folder of the files.

    Raises:
        KAFError: The name is none, the package is missing, or the repository cannot be had.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?", place)
    if not match:
        raise KAFError(f"--init {place}: expected hf://owner/name, or hf://owner/name@revision.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise KAFError(
            f"--init {place} needs the package huggingface_hub, which cannot be imported ({error}). Run: pip install "
            "'nnunetv2-kaf[hub]', or download the files yourself and name their folder."
        ) from error
    try:
        folder = snapshot_download(match[1], revision=match[2], allow_patterns=[CHECKPOINT, PLAN, CONFIG])
    except Exception as error:  # the package, its network and its server have many
        raise KAFError(
            f"--init {place}: the repository cannot be had ({type(error).__name__}: {one_line(error)[:300]}). Check "
            "the name and the network, or download the files yourself and name their folder."
        ) from error
    return Path(folder)
