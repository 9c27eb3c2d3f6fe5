"""Guess which experts the next layer will choose, and hint them to the store, which reads while this layer computes.

A guess never changes results. Guesses are made while decoding: a prompt uses most experts anyway.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.stores.contract import ExpertStore

POLICIES = ("none", "previous_token", "next_router", "early_router")

Likely = Sequence[Sequence[int]]
"""Experts that a layer may choose for each sequence, the likeliest first."""


@dataclass
class Guesses:
    """Guesses for one sequence: their counts, and the state from which the next guesses are made."""

    predicted: int = 0
    """Experts that were hinted before a layer of a decode step chose."""
    correct: int = 0
    """Hinted experts that the layer then chose."""
    hinted: dict[int, frozenset[int]] = field(default_factory=dict, repr=False)
    """Experts hinted for each layer that has not chosen since."""
    last: dict[int, Sequence[int]] = field(default_factory=dict, repr=False)
    """Experts that each layer chose for the latest token."""

    def to_json(self) -> dict[str, float | None]:
        """Return both counts and their ratio, which is None without a guess."""
        accuracy = self.correct / self.predicted if self.predicted else None
        return {"predicted": self.predicted, "right": self.correct, "accuracy": accuracy}


class Prefetcher:
    """Base class of prefetchers, which hint experts of the following layer to ``store``.

    ``begin_pass`` names the sequences of each forward pass and its phase. Only decode steps are guessed and counted.
    ``DecoderLayer`` and ``MixtureOfExperts`` report every layer: ``begins``, ``guess`` before the router's choice is
    evaluated, and ``chosen`` when the experts of this layer are in their slots.
    """

    def __init__(self, store: ExpertStore, num_layers: int) -> None:
        self._store = store
        self._num_layers = num_layers
        self._sequences: Sequence[Guesses] = (Guesses(),)
        self._latest = [0]
        self._decoding = False

    def begin_pass(self, sequences: Sequence[Guesses], lengths: Sequence[int], decoding: bool) -> None:
        """Begin a forward pass.

        Args:
            sequences: the guesses of each sequence in the pass.
            lengths: the number of rows of each sequence in every array [T, ...]; the last one is its latest token.
            decoding: whether the pass is a decode step, in which every sequence has one row.
        """
        self._sequences = sequences
        self._latest = [end - 1 for end in accumulate(lengths)]
        self._decoding = decoding

    def begins(self, layer: int, x: mx.array) -> None:
        """Receive the input residual ``x`` [T, hidden] of ``layer``."""
        if self._decoding:
            self._hint(layer, self._likely_now(layer, x))

    def guess(self, layer: int, x: mx.array) -> mx.array | None:
        """Guess, lazily, the experts [T, K] of the layer after ``layer``, from the residual ``x`` [T, hidden]."""
        return self._guess(layer, x) if self._decoding else None

    def chosen(self, layer: int, experts: npt.NDArray[np.uint32], guess: mx.array | None) -> None:
        """Receive the ``experts`` [T, K] that ``layer`` chose; ``guess`` is an evaluated result of ``guess``."""
        for guesses, chosen in zip(self._sequences, experts[self._latest].tolist(), strict=True):
            guesses.last[layer] = chosen
            hinted = guesses.hinted.pop(layer, frozenset())
            if self._decoding:
                guesses.predicted += len(hinted)
                guesses.correct += len(hinted.intersection(chosen))
        if self._decoding:
            following = (layer + 1) % self._num_layers
            self._hint(following, self._likely(following, guess))

    def _hint(self, layer: int, likely: Likely) -> None:
        """Hint the union over all sequences, by rank: first the likeliest expert of each sequence."""
        union = _by_rank(likely)
        if union:
            for guesses, experts in zip(self._sequences, likely, strict=True):
                guesses.hinted[layer] = frozenset(experts)
            self._store.prefetch(layer, union)

    def _likely_now(self, layer: int, x: mx.array) -> Likely:  # noqa: ARG002  # a policy may guess here
        """Guess which experts ``layer`` itself will choose, from its input residual ``x``."""
        return ()

    def _guess(self, layer: int, x: mx.array) -> mx.array | None:  # noqa: ARG002  # a policy may guess here
        return None

    def _likely(self, following: int, guess: mx.array | None) -> Likely:  # noqa: ARG002  # a policy may guess here
        """Guess which experts the layer ``following`` will choose; ``guess`` is the result of ``_guess``."""
        return ()


class PreviousToken(Prefetcher):
    """A prefetcher that guesses that every layer chooses the same experts as for the previous token."""

    def _likely(self, following: int, guess: mx.array | None) -> Likely:  # noqa: ARG002
        return [guesses.last.get(following, ()) for guesses in self._sequences]


class NextRouter(Prefetcher):
    """A prefetcher that applies layer L+1's router to layer L's residual.

    The residual still lacks layer L's experts and layer L+1's mixer. The last layer is followed by the first layer of a
    token that is not known yet: no guess.
    """

    def __init__(self, store: ExpertStore, routers: Sequence[Router]) -> None:
        super().__init__(store, len(routers))
        self._routers = routers

    def _guess(self, layer: int, x: mx.array) -> mx.array | None:
        if layer + 1 == self._num_layers:
            return None
        following = self._routers[layer + 1]
        return mx.argsort(-following.scores(x), axis=-1)[:, : following.experts_k]

    def _likely(self, following: int, guess: mx.array | None) -> Likely:  # noqa: ARG002
        return () if guess is None else np.array(guess).tolist()


class EarlyRouter(Prefetcher):
    """A prefetcher that applies a layer's router to the residual before the layer's mixer.

    The guess is closer to the choice than the guess of ``NextRouter`` and more often correct, but reads have only the
    mixer's time. Its immediate evaluation costs one more synchronization per layer, so it suits CPUs.
    """

    def __init__(self, store: ExpertStore, routers: Sequence[Router]) -> None:
        super().__init__(store, len(routers))
        self._routers = routers

    def _likely_now(self, layer: int, x: mx.array) -> Likely:
        router = self._routers[layer]
        scores = np.array(router.scores(x))
        # Not by MLX, whose sort takes longer than the product.
        likely: list[list[int]] = np.argsort(-scores, axis=-1)[:, : router.experts_k].tolist()
        return likely


def check_policy(policy: str) -> None:
    """Raise InputError unless ``policy`` is in ``POLICIES``."""
    if policy not in POLICIES:
        raise InputError(f"prefetch={policy}: unknown policy; choose from {', '.join(POLICIES)}")


def make_prefetcher(policy: str, store: ExpertStore, routers: Sequence[Router]) -> Prefetcher | None:
    """Make the prefetcher of ``policy`` for the ``routers`` of all layers; None for "none".

    Raises:
        InputError: ``policy`` is unknown, or needs routers and there are none.
    """
    check_policy(policy)
    if policy == "none":
        return None
    if policy == "previous_token":
        return PreviousToken(store, store.source.num_layers)
    if not routers:
        raise InputError(
            f"prefetch={policy}: the routers of this model cannot be applied in advance; use previous_token or none",
            code="invalid_value",
        )
    return NextRouter(store, routers) if policy == "next_router" else EarlyRouter(store, routers)


def _by_rank(likely: Iterable[Sequence[int]]) -> list[int]:
    ranks = zip_longest(*likely)
    return list(dict.fromkeys(expert for rank in ranks for expert in rank if expert is not None))
