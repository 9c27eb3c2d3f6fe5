"""Node 0 of several: it tells all other nodes about each pass before it begins.

Requests, texts and the choice of tokens exist on node 0 alone. All other nodes keep the caches of the same sequences,
and run the same passes with the tokens that they are told.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.nodes.group import Nodes

_BEATS = 4
"""Signs of life in the longest wait, while there is no pass."""


class Leader:
    """The orders of node 0.

    Args:
        nodes: the nodes, of which this is node 0.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._numbers = count()
        self._known: weakref.WeakKeyDictionary[Sequence, int] = weakref.WeakKeyDictionary()
        """The number of each sequence."""
        self._cache: SequenceCache | None = None
        """The cache of the latest pass without a sequence."""
        self._length = 0
        self._told: dict[int, int] = {}
        """The generated tokens of each sequence that all nodes know."""
        self._ended: dict[int, list[Any]] = {}
        """The reason, and the last tokens, of each sequence that has ended since the latest order."""
        self._gone: list[int] = []
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="signs of life", daemon=True)
        self._heart.start()

    @contextmanager
    def passing(
        self, kind: str, sequences: Listed[Sequence], *, lazy: bool, asked: Callable[[], bool], **more: Any
    ) -> Iterator[None]:
        """Order a pass, which the enclosed code runs.

        Args:
            kind: "prefill" or "decode".
            sequences: the sequences of the pass.
            lazy: whether no layer waits for its router.
            asked: whether the pass is to end early; only where it is not lazy.
            **more: further fields of the order. With ``steps`` 0, nothing is ordered.
        """
        if more.get("steps") == 0:  # the steps of an earlier order are under way
            with self._nodes.waiting_for_pass():
                yield
            return
        with self._nodes.lock:
            new = [
                {"id": self._number(one), "prompt": one.request.prompt_ids, "chunk": one.prefill_chunk}
                for one in sequences
                if one not in self._known
            ]
            listed = []
            for sequence in sequences:
                number = self._known[sequence]
                told = self._told.get(number, 0)
                state = [sequence.cache.length, len(sequence.ahead)]
                listed.append([number, told, sequence.token_ids[told:], *state])
                self._told[number] = len(sequence.token_ids)
            self._order(kind, new=new, sequences=listed, lazy=lazy, **more)
            with self._nodes.stopping(asked), self._nodes.waiting_for_pass() if lazy else nullcontext():
                yield

    @contextmanager
    def computing_logits(
        self, token_ids: list[int], cache: SequenceCache, *, lazy: bool, decoding: bool
    ) -> Iterator[None]:
        """Order a pass of ``token_ids`` that join ``cache``, which belongs to no sequence.

        Raises:
            InputError: ``cache`` is neither empty nor as the latest such pass left it; code "cache_of_one_node".
        """
        if cache.length and (cache is not self._cache or cache.length != self._length):
            raise InputError(
                "several nodes keep one cache that belongs to no sequence: continue the latest one, or begin a new one",
                code="cache_of_one_node",
            )
        with self._nodes.lock:
            self._order("logits", new=cache.length == 0, tokens=token_ids, lazy=lazy, decoding=decoding)
            with self._nodes.waiting_for_pass() if lazy else nullcontext():
                yield
        self._cache, self._length = cache, cache.length

    def end(self, sequence: Sequence, reason: str) -> None:
        """Tell all nodes with the next order that ``sequence`` has ended."""
        if sequence in self._known:
            number = self._known[sequence]
            told = self._told.get(number, 0)
            self._ended[number] = [number, reason, told, sequence.token_ids[told:]]

    def close(self) -> None:
        """Order all nodes to end."""
        self._closed.set()
        with self._nodes.lock, suppress(NodeLostError):
            self._order("end")
        self._heart.join()

    def _number(self, sequence: Sequence) -> int:
        number = self._known[sequence] = next(self._numbers)
        weakref.finalize(sequence, self._gone.append, number).atexit = False
        return number

    def _order(self, kind: str, **fields: Any) -> None:
        gone, self._gone[:] = list(self._gone), []
        ended, self._ended = self._ended, {}
        for number in gone:
            self._told.pop(number, None)
        self._nodes.finish_under_way()
        self._nodes.message({"do": kind, "ended": list(ended.values()), "gone": gone, **fields}, "all other nodes")

    def _beat(self) -> None:
        while not self._closed.wait(self._nodes.watchdog.timeout / _BEATS):
            with self._nodes.lock:
                if self._closed.is_set() or self._nodes.lost is not None:
                    return  # the thread of the engine has the error
                try:
                    self._order("nothing")
                except NodeLostError as error:
                    self._nodes.watchdog.end(error)
