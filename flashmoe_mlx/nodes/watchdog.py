"""A watchdog: ends the process if a wait for other nodes takes too long.

MLX's collectives wait without a limit in code that Python cannot interrupt, so only the end of the process ends them.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flashmoe_mlx.nodes.errors import NodeLostError

_CHECKS = 20
"""Checks in the longest wait."""
_GRACE = 2.0
"""Seconds for the functions that are told about the end of the process."""


@dataclass(slots=True)
class _Wait:
    """A wait for other nodes."""

    reason: str
    left: float


class Watchdog:
    """A thread that ends the process with one line on stderr.

    Args:
        timeout: the longest wait in seconds.

    Attributes:
        on_lost: receives the error before the process ends, to tell clients; has two seconds.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.on_lost: Callable[[NodeLostError], object] = lambda _: None
        self._waits: dict[int, _Wait] = {}
        """The wait of each thread."""
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog of nodes", daemon=True).start()

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Watch the enclosed wait for other nodes; waits of several threads are independent."""
        thread = threading.get_ident()
        outer = self._waits.get(thread)
        self._waits[thread] = _Wait(reason, self.timeout)
        try:
            yield
        finally:
            if outer is None:
                del self._waits[thread]
            else:
                self._waits[thread] = _Wait(outer.reason, self.timeout)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        interval = self.timeout / _CHECKS
        while not self._closed.wait(interval):
            # Counted in checks: a machine that slept, or a process that was stopped, has not waited for others.
            for wait in list(self._waits.values()):
                wait.left -= interval
                if wait.left <= 0:
                    self.end(
                        NodeLostError(
                            f"no answer from another node for {self.timeout:g} s while waiting for {wait.reason}: this "
                            "node ends. See the output of the other nodes; nodes.timeout= sets the time",
                            code="node_timeout",
                        )
                    )

    def end(self, error: NodeLostError) -> None:
        """End the process because of ``error``."""
        teller = threading.Thread(target=self._tell, args=(error,), daemon=True)
        teller.start()
        teller.join(_GRACE)
        with suppress(OSError, ValueError):
            sys.stderr.write(f"flashmoe_mlx: {error}\n")
            sys.stderr.flush()
        os._exit(NodeLostError.exit_code)

    def _tell(self, error: NodeLostError) -> None:
        self.on_lost(error)
