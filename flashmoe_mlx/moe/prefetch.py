"""Guess which experts the next layer will choose, and tell the store, so that it can read while this layer computes.

A guess never changes what is computed. Guesses are made while decoding: a prompt asks for most experts anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.contract import ExpertStore

if TYPE_CHECKING:
    from flashmoe_mlx.models.decoder import DecoderLayer

POLICIES = ("none", "previous_token", "next_router", "early_router")


@dataclass
class Guesses:
    """Guesses about one sequence: their counts, and the state from which the next ones are made."""

    predicted: int = 0
    """Experts that were hinted before a layer of a decode step chose."""
    right: int = 0
    """Experts among them that the layer then chose."""
    hinted: dict[int, frozenset[int]] = field(default_factory=dict, repr=False)
    """Experts hinted for each layer that has not chosen since."""
    last: dict[int, Sequence[int]] = field(default_factory=dict, repr=False)
    """Experts that each layer chose for the latest token."""

    def to_json(self) -> dict[str, float | None]:
        """Return both counts and their ratio, which is None without a guess."""
        accuracy = self.right / self.predicted if self.predicted else None
        return {"predicted": self.predicted, "right": self.right, "accuracy": accuracy}


class Prefetcher:
    """Hints experts of the following layer to ``store``.

    Before every forward pass ``begin_pass`` names the sequence and the phase: only decode steps are guessed and
    counted, however many tokens a pass has. ``DecoderLayer`` and ``MixtureOfExperts`` report every layer: ``begins``,
    ``guess`` before the router's choice is evaluated, and ``chosen`` when the experts of this layer are in their slots.
    """

    def __init__(self, store: ExpertStore, num_layers: int) -> None:
        self._store = store
        self._num_layers = num_layers
        self._guesses = Guesses()
        self._decoding = False

    def begin_pass(self, guesses: Guesses, decoding: bool) -> None:
        """Begin a forward pass of the sequence that ``guesses`` belongs to; ``decoding``: it is a decode step."""
        self._guesses = guesses
        self._decoding = decoding

    def begins(self, layer: int, x: mx.array) -> None:
        """Take the residual ``x`` [T, hidden] that ``layer`` begins with."""
        if self._decoding:
            self._hint(layer, self._likely_now(layer, x))

    def guess(self, layer: int, x: mx.array) -> mx.array | None:
        """Guess, lazily, the experts [K] of the layer after ``layer``, from the residual ``x`` [T, hidden]."""
        return self._guess(layer, x) if self._decoding else None

    def chosen(self, layer: int, experts: npt.NDArray[np.uint32], guess: mx.array | None) -> None:
        """Take the ``experts`` [T, K] that ``layer`` chose; ``guess`` came from ``guess`` and is evaluated."""
        mine = experts[-1].tolist()
        self._guesses.last[layer] = mine
        hinted = self._guesses.hinted.pop(layer, frozenset())
        if not self._decoding:
            return
        self._guesses.predicted += len(hinted)
        self._guesses.right += len(hinted.intersection(mine))
        following = (layer + 1) % self._num_layers
        self._hint(following, self._likely(following, guess))

    def _hint(self, layer: int, likely: Sequence[int]) -> None:
        if likely:
            self._guesses.hinted[layer] = frozenset(likely)
            self._store.prefetch(layer, likely)

    def _likely_now(self, layer: int, x: mx.array) -> Sequence[int]:  # noqa: ARG002  # a policy may guess here
        """Experts that ``layer`` itself may choose, the likeliest first, from the residual ``x`` it begins with."""
        return ()

    def _guess(self, layer: int, x: mx.array) -> mx.array | None:  # noqa: ARG002  # a policy may guess here
        return None

    def _likely(self, following: int, guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002  # or here
        """Experts that the layer ``following`` may choose, the likeliest first; ``guess`` is that of ``_guess``."""
        return ()


class PreviousToken(Prefetcher):
    """Guesses that every layer chooses the same experts as for the token before."""

    def _likely(self, following: int, guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002
        return self._guesses.last.get(following, ())


class NextRouter(Prefetcher):
    """Guesses by applying layer L+1's router to layer L's residual.

    Between the two lie layer L's experts and layer L+1's mixer. After the last layer comes the first one of a token
    that is not known yet: no guess.
    """

    def __init__(self, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> None:
        super().__init__(store, len(layers))
        self._layers = layers

    def _guess(self, layer: int, x: mx.array) -> mx.array | None:
        if layer + 1 == self._num_layers:
            return None
        following = self._layers[layer + 1]
        scores = following.experts.gate(mx.fast.rms_norm(x, following.post_norm, following.eps))[0]
        return mx.argsort(-scores)[: following.experts.experts_k]

    def _likely(self, following: int, guess: mx.array | None) -> Sequence[int]:  # noqa: ARG002
        return [] if guess is None else np.array(guess).tolist()


class EarlyRouter(Prefetcher):
    """Guesses by applying a layer's router to the residual before the layer's mixer.

    Nearer to the choice than ``NextRouter``, and so right more often; only the mixer's time is left to read in. The
    guess is evaluated at once, one more synchronization a layer: made for CPUs.
    """

    def __init__(self, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> None:
        super().__init__(store, len(layers))
        self._layers = layers

    def _likely_now(self, layer: int, x: mx.array) -> Sequence[int]:
        own = self._layers[layer]
        scores = own.experts.gate(own.kernels.rms_norm(x, own.post_norm, own.eps))[0]
        # Not by MLX, where evaluating a sort takes longer than the product.
        likely: list[int] = np.argsort(-np.array(scores.astype(mx.float32)))[: own.experts.experts_k].tolist()
        return likely


def check_policy(policy: str) -> None:
    """Raise InputError unless there is such a policy."""
    if policy not in POLICIES:
        raise InputError(f"prefetch={policy}: no such policy; there are {', '.join(POLICIES)}")


def make_prefetcher(policy: str, store: ExpertStore, layers: Sequence["DecoderLayer"]) -> Prefetcher | None:
    """Make the prefetcher of ``policy``; None for "none".

    Raises:
        InputError: there is no such policy.
    """
    check_policy(policy)
    if policy == "none":
        return None
    if policy == "previous_token":
        return PreviousToken(store, len(layers))
    return NextRouter(store, layers) if policy == "next_router" else EarlyRouter(store, layers)
