"""The group of nodes: the collectives of MLX, each with a watchdog."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.shares import Share, check_weights
from flashmoe_mlx.nodes.errors import NodeFailedError, NodeLostError, NodeMismatchError, StoppedError
from flashmoe_mlx.nodes.watchdog import Watchdog

_VARIABLES = {
    "MLX_HOSTFILE": "ring",
    "NCCL_HOST_IP": "nccl",
    "MLX_JACCL_COORDINATOR": "jaccl",
    "OMPI_COMM_WORLD_RANK": "mpi",
}
"""A variable of the environment that ``mlx.launch`` sets for each of its backends."""
_OF_MLX = re.compile(r"\b(ring|nccl|jaccl|mpi)\b", re.IGNORECASE)
"""Matches errors of the backends."""
_MESSAGE = 1024
"""Bytes of the first part of a message, which holds most messages as a whole."""
_LENGTH = 4
_TEXT = 400
"""Bytes of a text that every node sends to every other node."""
_POLL = 0.5
"""Seconds between two exchanges of states while models are loaded."""
_LOADING, _LOADED, _FAILED = range(3)


def _evaluated(array: mx.array) -> npt.NDArray[Any]:
    """Evaluate a result of a collective; ``np.array`` alone would hide the error of a lost connection."""
    mx.eval(array)
    return np.array(array)


def launched() -> bool:
    """Return whether this process was started as one of several nodes."""
    return any(variable in os.environ for variable in _VARIABLES)


class Nodes:
    """A process as one node of a group.

    All nodes call the methods in the same order. A method that waits for other nodes raises NodeLostError if one is
    gone, or ends the process after ``timeout`` seconds.

    Args:
        weights: the weights of the nodes; None for equal weights.
        timeout: the longest wait for other nodes, in seconds.

    Attributes:
        share: the experts of this node.
        watchdog: watches the waits.
        lock: held by the leader from an order to the end of its pass.
        lost: the error after which the group cannot continue; None before it.
        under_way: a result of collectives that were begun and not waited for, or None.
    """

    def __init__(self, weights: tuple[float, ...] | None = None, timeout: float = 60.0) -> None:
        backend = next(name for variable, name in _VARIABLES.items() if variable in os.environ)
        self.watchdog: Watchdog = Watchdog(timeout)
        self.lost: NodeLostError | None = None
        self.under_way: mx.array | None = None
        with self._waiting("the start of all nodes"):
            self._group = mx.distributed.init(strict=True, backend=backend)
        size = self._group.size()
        weights = weights or (1.0,) * size
        check_weights(weights)
        if len(weights) != size:
            raise InputError(
                f"nodes.weights={list(weights)}: {len(weights)} weights for {size} nodes", code="invalid_weights"
            )
        self.backend = backend
        self.share: Share = Share(self._group.rank(), weights)
        self.lock: threading.RLock = threading.RLock()
        self._asked: Callable[[], bool] = lambda: False

    @property
    def rank(self) -> int:
        """The number of this node; node 0 leads."""
        return self.share.node

    @property
    def size(self) -> int:
        """The number of nodes."""
        return self.share.nodes

    @contextmanager
    def _waiting(self, reason: str) -> Iterator[None]:
        if self.lost is not None:
            raise self.lost  # another collective would wait for ever
        with self.watchdog.waiting(reason):
            try:
                yield
            except RuntimeError as error:
                if not _OF_MLX.search(str(error)):
                    raise
                self.lost = NodeLostError(
                    f"the connection to another node was lost while waiting for {reason} ({error}); see the output of "
                    "the other nodes, and start all of them again"
                )
                raise self.lost from error

    def _sum(self, values: mx.array) -> mx.array:
        return mx.distributed.all_sum(values, group=self._group)

    def add(self, y: mx.array, failed: bool) -> mx.array:
        """Return the sum of ``y`` [T, hidden] over all nodes, evaluated.

        The sum has the same bits on every node. Two nodes add in one order; with more nodes MLX chooses an order for
        each part of the array.

        Raises:
            NodeFailedError: another node called this with ``failed``.
            StoppedError: node 0 cancelled the pass; see ``stopping``.
        """
        flags = np.zeros(self.size + 1, np.float32)
        flags[self.rank], flags[-1] = failed, self._asked()
        payload = mx.concatenate([y.reshape(-1), mx.array(flags).astype(y.dtype)])
        with self._waiting("the experts of a layer"):
            total = self._sum(payload)
            told = _evaluated(total[y.size :].astype(mx.float32))
        if told[:-1].any():
            if not failed:
                node = int(np.flatnonzero(told[:-1])[0])
                raise NodeFailedError(f"node {node} cannot serve its experts; its output says why")
        elif told[-1]:
            raise StoppedError
        return total[: y.size].reshape(y.shape)

    def add_lazily(self, y: mx.array) -> mx.array:
        """Return the sum of ``y`` over all nodes, lazily; whoever evaluates it calls ``waiting_for_pass``."""
        return self._sum(y)

    def of_first(self, value: mx.array) -> mx.array:
        """Return node 0's ``value`` of an integer type, lazily.

        The sum depends on ``value`` on every node, so that all nodes evaluate it after the same other sums.
        """
        return self._sum(value if self.rank == 0 else value * 0)

    def finish_under_way(self) -> None:
        """Wait for the collectives that are ``under_way``: those of another thread would not run after them."""
        if self.under_way is not None:
            with self.waiting_for_pass():
                mx.eval(self.under_way)
            self.under_way = None

    @contextmanager
    def waiting_for_pass(self) -> Iterator[None]:
        """Watch the evaluation of a pass with lazy sums."""
        with self._waiting("the pass of all nodes"):
            yield

    @contextmanager
    def stopping(self, asked: Callable[[], bool]) -> Iterator[None]:
        """End the enclosed pass on all nodes, in the same layer, as soon as ``asked`` returns True on any."""
        self._asked = asked
        try:
            yield
        finally:
            self._asked = lambda: False

    def message(self, content: Mapping[str, Any] | None, reason: str = "an order of node 0") -> dict[str, Any]:
        """Return the ``content`` that node 0 gave; all other nodes give None."""
        data = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
        first = (len(data).to_bytes(_LENGTH, "little") + data)[:_MESSAGE]
        received = self._bytes_of_first(first, _MESSAGE, reason)
        length = int.from_bytes(received[:_LENGTH], "little")
        rest = length + _LENGTH - _MESSAGE
        if rest > 0:
            received += self._bytes_of_first(data[_MESSAGE - _LENGTH :], rest, reason)
        parsed: dict[str, Any] = json.loads(received[_LENGTH : _LENGTH + length])
        return parsed

    def _bytes_of_first(self, data: bytes, size: int, reason: str) -> bytes:
        values = np.zeros(size, np.uint8)
        values[: len(data)] = np.frombuffer(data, np.uint8)
        with self._waiting(reason):
            return _evaluated(self._sum(mx.array(values))).tobytes()

    def numbers(self, value: int) -> list[int]:
        """Return the ``value`` of each node, at least 0 and below 2**31."""
        with self._waiting("the state of all nodes"):
            gathered = _evaluated(mx.distributed.all_gather(mx.array([value], mx.int32), group=self._group))
        return [int(number) for number in gathered]

    def texts(self, text: str) -> list[str]:
        """Return the ``text`` of each node, cut to 400 bytes."""
        values = np.zeros((1, _TEXT), np.uint8)
        data = text.encode()[:_TEXT]
        values[0, : len(data)] = np.frombuffer(data, np.uint8)
        with self._waiting("the state of all nodes"):
            rows = _evaluated(mx.distributed.all_gather(mx.array(values), group=self._group))
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Compare ``facts`` with those of node 0.

        Raises:
            NodeMismatchError: a node differs; every node raises it.
        """
        expected = self.message(dict(facts) if self.rank == 0 else None, "the facts of node 0")
        own = json.loads(json.dumps(facts))
        differing = [
            f"{name} is {own.get(name)} and not {value}" for name, value in expected.items() if own.get(name) != value
        ]
        for node, text in enumerate(self.texts("; ".join(differing))):
            if text:
                raise NodeMismatchError(
                    f"node {node} differs from node 0: {text}; start every node with the same version, model and "
                    "options"
                )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Keep in touch with the other nodes while the block loads a model; return when all nodes have loaded theirs.

        Raises:
            NodeFailedError: another node failed; it raises its own error.
        """
        state = [_LOADING]
        outcome: list[BaseException] = []

        def exchange() -> None:
            try:
                while True:
                    states = self.numbers(state[0])
                    if _FAILED in states:
                        node = states.index(_FAILED)
                        raise NodeFailedError(f"node {node} cannot load its model; its output says why")
                    if states == [_LOADED] * self.size:
                        return
                    time.sleep(_POLL if _LOADING in states else 0)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=exchange, name="states of nodes", daemon=True)
        thread.start()
        try:
            yield
            state[0] = _LOADED
        except BaseException:
            state[0] = _FAILED
            raise
        finally:
            thread.join()
        if outcome:
            raise outcome[0]

    def close(self) -> None:
        """Stop watching."""
        self.watchdog.close()
