"""Reports about a long step, from the code that takes the time to whoever waits for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock, Timer

Listener = Callable[[str], None]
"""Takes the current activity in a few words; threads call it in turn."""


class _Patient:
    """Reports for ``listener``; ``release`` passes on the latest, and from then on each one."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._latest: str | None = None
        self._released = False
        self._lock = Lock()

    def report(self, activity: str) -> None:
        with self._lock:
            self._latest = activity
            if self._released:
                self._listener(activity)

    def release(self) -> None:
        with self._lock:
            self._released = True
            if self._latest is not None:
                self._listener(self._latest)


_patient: ContextVar[_Patient | None] = ContextVar("patient", default=None)


def report(activity: str) -> None:
    """Tell the listener, if there is one, about the current activity, in a few words."""
    patient = _patient.get()
    if patient is not None:
        patient.report(activity)


@contextmanager
def reports_to(listener: Listener, after: float = 1.0) -> Iterator[None]:
    """Send this thread's reports in the block to ``listener``, unless the block ends within ``after`` seconds."""
    patient = _Patient(listener)
    timer = Timer(after, patient.release)
    timer.daemon = True
    timer.start()
    token = _patient.set(patient)
    try:
        yield
    finally:
        _patient.reset(token)
        timer.cancel()
        timer.join()
