"""SIGTERM and SIGUSR1, by which clusters announce that a job will be stopped, and SIGHUP of a terminal that closes."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class PreemptedError(BaseException):
    """The run was asked to stop; what could be saved has been saved.

    Like `KeyboardInterrupt` no `Exception`: it may come anywhere, and must not be taken for an unreadable file there.
    """


class Preemption:
    """Turns the signals into a request that the training loop answers between two steps.

    While nothing is being trained (`deferred` is False) there is nothing to save, and a signal raises `PreemptedError`
    at once. Only the main thread may install signal handlers; elsewhere this does nothing.

    Attributes:
        requested: Name of the signal that came, or `None`.
        deferred: Whether somebody will look at `requested`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        """Install the handlers."""
        try:
            # ignored by nohup: a closed terminal is then no reason to stop
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        except ValueError:  # not the main thread
            self._previous = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        if not self.deferred:
            raise PreemptedError(f"{self.requested}: stopped before the training began; nothing was lost.")
