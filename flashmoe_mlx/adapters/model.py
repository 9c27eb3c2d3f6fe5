"""A model of MLX-LM with its routed experts in a store, as the engine sees it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx

from flashmoe_mlx.adapters.cache import AdaptedCache
from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.library import mlx_lm
from flashmoe_mlx.adapters.switches import Pass, Switch
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.models.prompt_memory import PromptMemory
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.router import Router

_MOST_TOKENS = 2048
"""The largest number of tokens of a prompt that go through a layer together, as in MLX-LM."""


def adapted_prompt_memory(hidden_size: int, experts_k: int) -> PromptMemory:
    """Return the memory of prompt tokens: streams of activations and the outputs of all chosen experts."""
    per_token = (8 + 3 * experts_k) * hidden_size * 4
    return PromptMemory(per_token, BLOCK * per_token, 0, 0, _MOST_TOKENS)


class AdaptedModel:
    """A model of MLX-LM; its modules compute everything but the choice of memory for experts.

    Sequences of one pass run one after the other.
    """

    def __init__(
        self, module: Any, config: AdaptedConfig, experts_k: int, running: Pass, switches: Sequence[Switch], nbytes: int
    ) -> None:
        """Wrap a model whose layers of experts stream.

        Args:
            module: the model.
            config: its sizes.
            experts_k: the number of routed experts of a token.
            running: shared with its layers of experts.
            switches: the layers of experts, which tell the place of the backbone.
            nbytes: the size of the resident weights.
        """
        self.config = config
        self.experts_k = experts_k
        self.touched_bytes = nbytes
        self.routers: Sequence[Router] = ()
        self._module = module
        self._running = running
        self._backbone = Backbone.inside(module, switches[0].path)
        self._make_cache = mlx_lm("models.cache").make_prompt_cache
        floats = (array for array in arrays_of(module) if mx.issubdtype(array.dtype, mx.floating))
        self.dtype: mx.Dtype = next(floats).dtype

    @property
    def state_bytes(self) -> int:
        """0: only the caches of tokens are kept for later prompts."""
        return 0

    @property
    def prompt_memory(self) -> PromptMemory:
        """The memory of prompt tokens."""
        return adapted_prompt_memory(self.config.hidden_size, self.experts_k)

    def new_cache(self) -> SequenceCache:
        """Return the caches of a sequence without tokens."""
        return SequenceCache([AdaptedCache(inner) for inner in self._make_cache(self._module)])

    def forward(
        self, tokens: mx.array, lengths: Sequence[int], caches: Sequence[SequenceCache], context: ForwardContext
    ) -> mx.array:
        """Compute the hidden states [T, hidden] of new tokens; see ``decoder.Model.forward``."""
        self._running.context = context
        try:
            rows = [
                self._backbone.hidden(tokens[end - length : end], cache)
                for cache, length, end in zip(caches, lengths, accumulate(lengths), strict=True)
            ]
        finally:
            self._running.context = None
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits f32 [T, vocabulary] of hidden states [T, hidden], lazily."""
        return self._backbone.logits(hidden).astype(mx.float32)


class Backbone:
    """A model of MLX-LM in two parts: the module with all layers, and the rest, which computes logits.

    The class of that module is replaced by a subclass. A call of the model then stops after the layers, or begins
    after them, so that logits are computed for the wanted tokens only.
    """

    def __init__(self, module: Any, inner: Any) -> None:
        self._module = module
        self._inner = inner
        self._given: mx.array | None = None
        self._found: mx.array | None = None
        if inner is not None:
            inner.__class__ = self._stopping(type(inner))

    @classmethod
    def inside(cls, module: Any, path: str) -> "Backbone":
        """Return the parts of ``module``, in which ``path`` names a module of a layer."""
        inner = module
        for part in path.split("."):
            child = inner[part]
            if isinstance(child, list):
                break
            inner = child
        return cls(module, None if inner is module else inner)

    def _stopping(self, own: type) -> type:
        backbone = self

        class Stopping(own):  # type: ignore[misc]
            """The module with all layers; remembers its result, or returns the given one."""

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                if backbone._given is not None:
                    return backbone._given
                backbone._found = super().__call__(*args, **kwargs)
                return backbone._found

        return Stopping

    def hidden(self, tokens: mx.array, cache: SequenceCache) -> mx.array:
        """Compute the hidden states [T, hidden] of ``tokens`` uint32 [T], which join ``cache``, lazily.

        They are logits if the model has no module with all layers.
        """
        cache.broken = True
        result = self._module(tokens[None], cache=[layer.inner for layer in _adapted(cache)])
        found, self._found = self._found, None
        for layer in _adapted(cache):
            layer.length += len(tokens)
        cache.length += len(tokens)
        cache.broken = False
        return (result if found is None else found)[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """Compute the logits [T, vocabulary] of ``hidden``, a result of ``hidden`` or rows of one, lazily."""
        if self._inner is None:
            return hidden
        self._given = hidden[None]
        try:
            logits: mx.array = self._module(mx.zeros((1, len(hidden)), mx.uint32), cache=None)[0]
        finally:
            self._given = None
        return logits


def _adapted(cache: SequenceCache) -> list[AdaptedCache]:
    layers = list(cache.layers)
    assert all(isinstance(layer, AdaptedCache) for layer in layers)
    return layers  # type: ignore[return-value]


def arrays_of(module: Any) -> list[mx.array]:
    """Return all parameters of ``module``."""
    found: list[mx.array] = []

    def visit(value: Any) -> None:
        if isinstance(value, mx.array):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)

    visit(module.parameters())
    return found
