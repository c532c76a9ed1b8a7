"""pretraining.log: the log of a run, beside its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path


@contextmanager
def log_file(path: Path) -> Iterator[MemoryHandler]:
    """Append the log of this package to a file; what comes before the first flush is kept in memory until then."""
    file = logging.FileHandler(path, delay=True, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler = _LogFromFlush(file)
    package = logging.getLogger(__name__.split(".")[0])
    package.addHandler(handler)
    try:
        yield handler
    finally:
        package.removeHandler(handler)
        handler.close()
        file.close()


class _LogFromFlush(MemoryHandler):
    """Keeps records until it is flushed for the first time, and passes them on at once from then on."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__(capacity=1, target=target, flushOnClose=False)
        self.begun = False

    def shouldFlush(self, record: logging.LogRecord) -> bool:  # noqa: N802 - the name in logging
        """Whether to pass the records on."""
        return self.begun

    def flush(self) -> None:
        """Begin, and pass on what has been kept."""
        self.begun = True
        super().flush()
