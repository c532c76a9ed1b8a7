"""Shared by every test: the marker of the slow tests and one thread per process."""

from __future__ import annotations

import os

import pytest

# Set before torch is imported: several small networks at once are slower with a thread pool each.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "integration: runs nnU-Net's stock commands in subprocesses (minutes)")
