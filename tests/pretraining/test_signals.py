"""What a cluster's signals do; whole runs that are stopped by them are in test_run.py."""

from __future__ import annotations

import signal
import threading

import pytest

from pretraining.signals import SIGNALS, PreemptedError, Preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_while_training_a_signal_is_only_noted(name: str) -> None:
    number = getattr(signal, name)
    before = [signal.getsignal(n) for n in SIGNALS]
    with Preemption() as preemption:
        assert preemption.requested is None
        preemption.deferred = True
        signal.raise_signal(number)
        assert preemption.requested == name
        signal.raise_signal(number)  # clusters repeat it
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_before_training_a_signal_stops_at_once(name: str) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(PreemptedError, match=f"{name}: stopped before the training began"), Preemption():
        signal.raise_signal(getattr(signal, name))
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_it_is_never_taken_for_a_failure() -> None:
    """Whoever reads files catches every Exception, and calls the file bad."""

    def read() -> str:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            return "a bad file"
        return "a good file"

    with pytest.raises(PreemptedError), Preemption():
        read()


def test_the_handlers_that_were_there_come_back_after_an_error() -> None:
    def own(*_: object) -> None:
        """A handler of the caller."""

    previous = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(ValueError, match="something else"), Preemption():
            raise ValueError("something else")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[object] = []

    def work() -> None:
        with Preemption() as preemption:
            found.extend([preemption.requested, *(signal.getsignal(n) for n in SIGNALS)])

    before = [signal.getsignal(n) for n in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, *before]
