"""The part of a runner that differs between one machine and several: orders of passes, and agreement about them."""

from contextlib import AbstractContextManager, nullcontext

from flashmoe_mlx.generation.leading import Leader
from flashmoe_mlx.generation.passes import refuse_cancelled
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.nodes.group import Nodes


class Orders:
    """The passes of a runner on one machine, or on one of several nodes.

    Args:
        nodes: the nodes; None for one machine.

    Attributes:
        leader: tells all other nodes about each pass; only on node 0 of several.
        lazy: on all other nodes, whether no layer of the ordered pass waits for its router.
    """

    def __init__(self, nodes: Nodes | None) -> None:
        self._nodes = nodes
        self.leader: Leader | None = Leader(nodes) if nodes is not None and nodes.rank == 0 else None
        self.lazy = False

    @property
    def follows(self) -> bool:
        """Whether another node chooses the tokens."""
        return self._nodes is not None and self.leader is None

    def passing(
        self, kind: str, running: list[Sequence], *, lazy: bool, **more: object
    ) -> AbstractContextManager[None]:
        """Return the context of a pass of ``running``; see ``Leader.passing``."""
        if self.leader is None:
            return nullcontext()
        return self.leader.passing(
            kind, running, lazy=lazy, asked=lambda: all(sequence.cancelled for sequence in running), **more
        )

    def computing_logits(
        self, token_ids: list[int], cache: SequenceCache, *, lazy: bool, decoding: bool
    ) -> AbstractContextManager[None]:
        """Return the context of a pass without sequences; see ``Leader.computing_logits``."""
        if self.leader is None:
            return nullcontext()
        return self.leader.computing_logits(token_ids, cache, lazy=lazy, decoding=decoding)

    def refuse_cancelled(self, running: list[Sequence]) -> None:
        """End a pass all of whose sequences are cancelled; several nodes agree about that in their sums instead."""
        if self._nodes is None:
            refuse_cancelled(running)

    def agree_on_start(self, sequence: Sequence, empty: SequenceCache) -> None:
        """Begin ``sequence`` with ``empty`` unless every node found the same beginning in its prompt cache."""
        if self._nodes is not None and len(set(self._nodes.numbers(sequence.prefilled))) > 1:
            sequence.begin_again(empty)

    def end(self, sequence: Sequence) -> None:
        """Tell all other nodes that ``sequence`` has ended."""
        if self.leader is not None and sequence.finish_reason is not None:
            self.leader.end(sequence, sequence.finish_reason)

    def close(self) -> None:
        """Order all other nodes to end."""
        if self.leader is not None:
            self.leader.close()
