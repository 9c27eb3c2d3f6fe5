"""The model as the engine sees it: tokens in, logits out, with the routed experts in a store."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.models.config import ModelSize
from flashmoe_mlx.models.prompt_memory import PromptMemory
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.router import Router


class RunnableModel(Protocol):
    """A model that ``generation`` can run: a ``decoder.Model``, or a model of another package."""

    @property
    def config(self) -> ModelSize:
        """The sizes of the model."""
        ...

    @property
    def experts_k(self) -> int:
        """The number of routed experts of a token in a layer."""
        ...

    @property
    def dtype(self) -> mx.Dtype:
        """The type of activations."""
        ...

    @property
    def routers(self) -> Sequence[Router]:
        """The routers of all layers, for guesses about experts; none if they cannot be applied on their own."""
        ...

    @property
    def touched_bytes(self) -> int:
        """The size of the resident weights that every pass reads."""
        ...

    @property
    def state_bytes(self) -> int:
        """The bytes that a sequence keeps at any length."""
        ...

    @property
    def prompt_memory(self) -> PromptMemory:
        """The memory of prompt tokens."""
        ...

    def new_cache(self) -> SequenceCache:
        """Return the caches of a sequence without tokens."""
        ...

    def forward(
        self, tokens: mx.array, lengths: Sequence[int], caches: Sequence[SequenceCache], context: ForwardContext
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of new tokens; see ``decoder.Model.forward``."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits f32 [T, vocabulary] of hidden states [T, hidden], lazily."""
        ...
