"""Ctrl-C during an answer."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_to(cancel: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Call ``cancel`` at each interrupt in the block; yield a function that returns whether one has occurred.

    An exception in a handler could leave a store's bookkeeping half done, therefore ``cancel`` only asks the running
    pass to end. Ignored interrupts, as in background jobs of a shell, stay ignored.
    """
    occurred = False

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the signature of a handler
        nonlocal occurred
        occurred = True
        cancel()

    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: occurred
    finally:
        signal.signal(signal.SIGINT, previous)
