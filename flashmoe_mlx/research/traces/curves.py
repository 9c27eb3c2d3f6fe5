"""Hit rate over capacity, for several policies on one trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.research.traces.simulator import CacheDesign, Replay, replay


@dataclass(frozen=True)
class Curve:
    """The replays of one policy, one for each number of ``slots`` for each layer, in ascending order."""

    policy: str
    scope: str
    slots: tuple[int, ...]
    replays: tuple[Replay, ...]

    @property
    def hit_rates(self) -> list[float]:
        """Hit rates of decode, one for each number of slots."""
        return [done.decode.hits / done.decode.requests for done in self.replays]


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
        slots: numbers of slots for each layer, in ascending order.
        scopes: "layer", "global", or both.
        hot: as in ``replay``.
        announce: called with a description of each replay before it begins.

    Raises:
        InputError: as ``replay``, or the trace has only a prompt (code "nothing_decoded").
    """
    tokens = len(trace.experts)
    if trace.prompt_tokens == tokens:
        raise InputError(
            "the trace has no decoded tokens, only a prompt: record more with max_tokens=", code="nothing_decoded"
        )
    for scope in scopes:
        for policy in policies:
            replays = []
            for number in slots:
                announce(f"{policy}, {number} slots a layer{'' if scope == 'layer' else ', one pool'}")
                replays.append(replay(trace, CacheDesign(policy, number, scope), hot=hot))
            yield Curve(policy, scope, tuple(slots), tuple(replays))
