"""Curves of the hit rate over the capacity of a cache, for several policies on one trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.cache_design import CacheDesign
from flashmoe_mlx.research.traces.simulator import Replay
from flashmoe_mlx.research.traces.simulator import replay as replay_trace

__all__ = ["Curve", "curves"]


@dataclass(frozen=True)
class Curve:
    """The replays of one policy and scope, one for each number of ``slots`` per layer, in ascending order."""

    policy: str
    scope: str
    slots: tuple[int, ...]
    replays: tuple[Replay, ...]

    @property
    def hit_rates(self) -> list[float]:
        """The hit rates of decode, one for each number of slots."""
        return [replay.decode.hits / replay.decode.requests for replay in self.replays]


def curves(
    trace: RoutingTrace,
    policies: Sequence[str],
    slots: Sequence[int],
    scopes: Sequence[str] = ("layer",),
    *,
    hot: RoutingTrace | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> Iterator[Curve]:
    """Yield a curve for each policy and scope.

    Args:
        trace: the requests.
        policies: names, as in ``CacheDesign``.
        slots: numbers of slots per layer, in ascending order.
        scopes: "layer", "global", or both.
        hot: the trace of hot experts, as in ``replay``.
        announce: called with a description of each replay before it begins.

    Raises:
        InputError: the trace has only a prompt (code "nothing_decoded"), or ``replay`` refuses it.
    """
    tokens = len(trace.experts)
    if trace.prompt_tokens == tokens:
        raise InputError(
            "the trace has a prompt but no decoded tokens; record it again with a larger max_tokens=",
            code="nothing_decoded",
        )
    for scope in scopes:
        for policy in policies:
            replays = []
            for number in slots:
                announce(f"{policy}, {number} slots per layer{'' if scope == 'layer' else ', one pool'}")
                replays.append(replay_trace(trace, CacheDesign(policy, number, scope), hot=hot))
            yield Curve(policy, scope, tuple(slots), tuple(replays))
