"""Random draws that depend on a seed and a step alone, so that a continued training repeats them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

UNLABELLED, TRAINING, VALIDATION = range(3)
"""Streams of random numbers."""


def seed_everything(words: Sequence[int]) -> None:
    """Seed the global generators of Python, NumPy and torch, which nnU-Net's loaders and transforms draw from.

    Args:
        words: Whole numbers from 0 up, e.g. a seed and a step.
    """
    state = np.random.SeedSequence([int(word) for word in words]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002  # what nnU-Net's loaders draw from
    torch.manual_seed(int(state[2]))


@contextmanager
def isolated(words: Sequence[int]) -> Iterator[None]:
    """Seed NumPy's and torch's global generators for a block, and give them back as they were.

    So draws for unlabelled patches leave the labelled batches of the same process as they are without them.

    Args:
        words: See `seed_everything`.
    """
    state = np.random.SeedSequence([int(word) for word in words]).generate_state(2)
    numpy_state = np.random.get_state()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    np.random.seed(int(state[0]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(state[1]))  # not manual_seed, which would seed the GPUs too
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.random.set_rng_state(torch_state)
