"""Guess which experts the next layer will choose, and tell the store, so that it can read while this layer computes.

A guess never changes what is computed. Guesses are made while decoding: a prompt asks for most experts anyway.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.expert_store import ExpertStore

if TYPE_CHECKING:
    from flashmoe_mlx.model.decoder import DecoderLayer

POLICIES = ("none", "previous_token", "next_router", "early_router")


@dataclass
class Guesses:
    """How many experts were guessed, and how many of them were then chosen."""

    predicted: int = 0
    right: int = 0

    def to_json(self) -> dict[str, float | None]:
        """Both, and their ratio."""
        accuracy = self.right / self.predicted if self.predicted else None
        return {"predicted": self.predicted, "right": self.right, "accuracy": accuracy}


class Prefetcher(ABC):
    """Hints experts of the following layer to ``store``; one for all sequences, whose guesses may then mix.

    ``MixtureOfExperts`` tells it of every layer: ``guess`` before the router's choice is evaluated, ``chosen`` when the
    experts of this layer are in their slots.
    """

    def __init__(self, store: ExpertStore, num_layers: int) -> None:
        self.guesses = Guesses()
        self._store = store
        self._num_layers = num_layers
        self._hinted: dict[int, frozenset[int]] = {}

    def begins(self, layer: int, x: mx.array) -> None:  # noqa: B027  # for those who make use of it
        """``layer`` begins with the residual ``x`` [1, hidden]."""

    def guess(self, layer: int, x: mx.array) -> mx.array | None:  # noqa: ARG002  # for those who make use of it
        """Experts [K] that the layer after ``layer`` may choose, lazily, of the residual ``x`` [1, hidden]."""
        return None

    def chosen(self, layer: int, experts: npt.NDArray[np.uint32], guess: mx.array | None) -> None:
        """``layer`` chose ``experts`` [T, K]; ``guess`` is what ``guess`` returned, evaluated."""
        mine = experts[-1].tolist()
        following = (layer + 1) % self._num_layers
        likely = self._likely(layer, following, mine, guess)
        hinted = self._hinted.pop(layer, frozenset())
        if len(experts) > 1:
            return
        self.guesses.predicted += len(hinted)
        self.guesses.right += len(hinted.intersection(mine))
        if likely:
            self._hinted[following] = frozenset(likely)
            self._store.prefetch(following, likely)

    @abstractmethod
    def _likely(self, layer: int, following: int, mine: Sequence[int], guess: mx.array | None) -> Sequence[int]:
        """Experts that ``following`` may choose, the likeliest first, given that ``layer`` chose ``mine``."""


class PreviousToken(Prefetcher):
    """Every layer chooses what it chose for the token before."""

    def __init__(self, store: ExpertStore, num_layers: int) -> None:
        super().__init__(store, num_layers)
        self._last: dict[int, Sequence[int]] = {}

    def _likely(self, layer: int, following: int, mine: Sequence[int], guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002
        self._last[layer] = mine
        return self._last.get(following, ())


class NextRouter(Prefetcher):
    """The next layer's router chooses for this layer's residual what it will choose for its own.

    Between the two lie this layer's experts and the next layer's mixer. After the last layer comes the first one of a
    token that is not known yet: no guess.
    """

    def __init__(self, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> None:
        super().__init__(store, len(layers))
        self._layers = layers

    def guess(self, layer: int, x: mx.array) -> mx.array | None:
        if layer + 1 == self._num_layers:
            return None
        following = self._layers[layer + 1]
        scores = following.experts.gate(mx.fast.rms_norm(x, following.post_norm, following.eps))[0]
        return mx.argsort(-scores)[: following.experts.experts_k]

    def _likely(self, layer: int, following: int, mine: Sequence[int], guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002
        return [] if guess is None else np.array(guess).tolist()


class EarlyRouter(Prefetcher):
    """Every layer's router chooses for the residual before the mixer what it will choose for the one after it.

    Nearer to the choice than ``NextRouter``, and so right more often; only the mixer's time is left to read in. The
    guess is evaluated at once, one more synchronisation a layer: made for CPUs.
    """

    def __init__(self, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> None:
        super().__init__(store, len(layers))
        self._layers = layers

    def begins(self, layer: int, x: mx.array) -> None:
        own = self._layers[layer]
        scores = own.experts.gate(own.kernels.rms_norm(x, own.post_norm, own.eps))[0]
        # Not by MLX, where evaluating a sort takes longer than the product.
        likely = np.argsort(-np.array(scores.astype(mx.float32)))[: own.experts.experts_k].tolist()
        self._hinted[layer] = frozenset(likely)
        self._store.prefetch(layer, likely)

    def _likely(self, layer: int, following: int, mine: Sequence[int], guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002
        return ()


def check_policy(policy: str) -> None:
    """Raise InputError unless there is such a policy."""
    if policy not in POLICIES:
        raise InputError(f"prefetch={policy}: no such policy; there are {', '.join(POLICIES)}")


def make_prefetcher(policy: str, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> Prefetcher | None:
    """What makes the guesses of ``policy``, or None.

    Raises:
        InputError: there is no such policy.
    """
    check_policy(policy)
    if policy == "none":
        return None
    if policy == "previous_token":
        return PreviousToken(store, len(layers))
    return NextRouter(store, layers) if policy == "next_router" else EarlyRouter(store, layers)
