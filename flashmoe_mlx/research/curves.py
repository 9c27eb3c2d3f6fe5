"""Hit rate over capacity, for several policies on one trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.simulator import CacheDesign, Replay, replay
from flashmoe_mlx.research.trace import RoutingTrace


@dataclass(frozen=True)
class Curve:
    """``replays`` of one policy with each of ``slots`` a layer, ascending."""

    policy: str
    scope: str
    slots: tuple[int, ...]
    replays: tuple[Replay, ...]

    @property
    def hit_rates(self) -> list[float]:
        """Of decode."""
        return [one.decode.hits / one.decode.requests for one in self.replays]


def curves(
    trace: RoutingTrace,
    policies: Sequence[str],
    slots: Sequence[int],
    scopes: Sequence[str] = ("layer",),
    *,
    hot: RoutingTrace | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> Iterator[Curve]:
    """A curve for each policy and scope.

    Raises:
        InputError: as ``replay``, or the trace has only a prompt.
    """
    tokens = len(trace.experts)
    if trace.prompt_tokens == tokens:
        raise InputError("the trace has no decoded tokens, only a prompt: record more with max_tokens=")
    for scope in scopes:
        for policy in policies:
            replays = []
            for number in slots:
                announce(f"{policy}, {number} slots a layer{'' if scope == 'layer' else ', one pool'}")
                replays.append(replay(trace, CacheDesign(policy, number, scope), hot=hot))
            yield Curve(policy, scope, tuple(slots), tuple(replays))
