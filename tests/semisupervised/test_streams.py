import os

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from semisupervised.seeding import isolated, seed_everything
from semisupervised.streams import Stream, training_workers, unlabelled_workers, validation_workers, without_workers

VARIABLE = "nnUNet_n_proc_DA"


class Draws(Dataset):
    """Item i depends on i alone."""

    def __getitem__(self, step):
        return torch.from_numpy(np.random.default_rng(step).random(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_begins_at_any_step_and_keeps_the_order(workers):
    source = Draws()
    stream = Stream(source, 4, workers, pin_memory=False)
    for step in range(4, 9):
        assert torch.equal(next(stream), source[step])
    stream.close()


@pytest.mark.parametrize(("processes", "shares"), [(0, (0, 1, 0)), (1, (1, 1, 1)), (2, (2, 1, 1)), (12, (8, 3, 4))])
def test_nnunets_processes_are_shared_between_the_streams(processes, shares, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv(VARIABLE, str(processes))
    assert (training_workers(), validation_workers(), unlabelled_workers()) == shares


@pytest.mark.parametrize("before", ["3", None])
def test_the_number_of_processes_comes_back(before, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    with without_workers():
        inside = os.environ.get(VARIABLE)
    assert (inside, os.environ.get(VARIABLE)) == ("0", before)


def test_draws_for_unlabelled_patches_leave_the_global_generators_as_they_were():
    seed_everything((1, 2))
    expected = np.random.random(), torch.rand(1)  # noqa: NPY002
    seed_everything((1, 2))
    with isolated((3,)):
        inside = np.random.random(), torch.rand(1)  # noqa: NPY002
    assert (np.random.random(), torch.rand(1)) == expected  # noqa: NPY002
    with isolated((3,)):
        assert (np.random.random(), torch.rand(1)) == inside  # noqa: NPY002
