"""Reports of a long operation to the code that waits for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock, Timer

Listener = Callable[[str], None]
"""Receives a short description of the current activity; never called by two threads at once."""


_INTERVAL = 0.5
"""Shortest time in seconds between two reports of one activity, which differ only after the colon."""


class _Patient:
    """Reports for ``listener``: ``release`` passes on the latest report, and later reports follow at once."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._latest: str | None = None
        self._released = False
        self._told = ("", 0.0)
        self._lock = Lock()

    def report(self, activity: str) -> None:
        with self._lock:
            self._latest = activity
            if self._released:
                self._tell(activity)

    def release(self) -> None:
        with self._lock:
            self._released = True
            if self._latest is not None:
                self._tell(self._latest)

    def _tell(self, activity: str) -> None:
        kind, now = activity.partition(":")[0], time.monotonic()
        if kind != self._told[0] or now >= self._told[1] + _INTERVAL:
            self._told = kind, now
            self._listener(activity)


_patient: ContextVar[_Patient | None] = ContextVar("patient", default=None)


def report(activity: str) -> None:
    """Tell the listener, if there is one, about the current activity, in a few words."""
    patient = _patient.get()
    if patient is not None:
        patient.report(activity)


@contextmanager
def reports_to(listener: Listener, after: float = 1.0) -> Iterator[None]:
    """Send this thread's reports in the block to ``listener``, unless the block ends within ``after`` seconds.

    On a system that starts no more threads, there are no reports.
    """
    patient = _Patient(listener)
    timer = Timer(after, patient.release)
    timer.daemon = True
    with suppress(RuntimeError):
        timer.start()
    token = _patient.set(patient)
    try:
        yield
    finally:
        _patient.reset(token)
        timer.cancel()
        if timer.ident is not None:
            timer.join()
