"""The native families in transformers, in float32 on a CPU, with weights by canonical name."""

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any
from unittest import mock

import numpy as np
import torch
from tiny_checkpoints import Geometry, random_words
from transformers import (
    Cache,
    DynamicCache,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen4ExpForCausalLM,
    Qwen4ExpTextConfig,
)

from oracle.recorded import DECODE_STEPS, PROMPT_LENGTH, TOLERANCE

ARGMAX_MARGIN = 2 * TOLERANCE
"""Smallest margin of a recorded token; implementations within the tolerance have the same argmax."""

INDEX_MARGIN = 2e-5
"""Smallest margin between the scores of a selected block and of a block that is not selected."""

ROUTING_MARGIN = 5e-4
"""Smallest margin of a recorded expert. Router logits of float32 implementations differ by about 1e-5."""


_CLASSES = {
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen4_exp": (Qwen4ExpTextConfig, Qwen4ExpForCausalLM),
}


class Reference:
    """The model, and the smallest margin of all choices that its routers have made."""

    def __init__(self, geometry: Geometry, weights: Mapping[str, np.ndarray], experts_k: int | None = None) -> None:
        config_class, model_class = _CLASSES[geometry.family]
        config = config_class(**geometry.text_config())
        config.num_experts_per_tok = experts_k or geometry.top_k
        # Use the reference implementations rather than optimized implementations.
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        self.model = model_class(config).eval()
        state = {
            name if name.startswith("lm_head") else f"model.{name}": torch.from_numpy(values)
            for name, values in weights.items()
        }
        if geometry.tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        found = self.model.load_state_dict(state, strict=False)
        assert not found.unexpected_keys
        hashes = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")  # the config determines them
        assert all(name.endswith(hashes) for name in found.missing_keys)
        self.index_margin = float("inf")
        """Smallest difference between the scores of the last selected block and of the first block not selected."""
        self.routing_margin = float("inf")
        """Smallest difference between the router logits of the last chosen expert and the first expert not chosen."""
        for index in geometry.moe_layers:
            self.model.model.layers[index].mlp.gate.register_forward_hook(self._watch_router)

    def _watch_router(self, router: torch.nn.Module, _: object, outputs: tuple[torch.Tensor, ...]) -> None:
        if router.top_k < router.num_experts:
            ranked = outputs[0].sort(dim=-1, descending=True).values
            margin = (ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min().item()
            self.routing_margin = min(self.routing_margin, margin)

    def _watch_index(self) -> Callable[..., Any]:
        """Return ``Tensor.topk``, which also measures the margin of the indexer; routers use ``torch.topk``."""
        original = torch.Tensor.topk

        def topk(scores: torch.Tensor, k: int, dim: int = -1) -> Any:
            if scores.ndim == 1 and k < len(scores):
                ranked = scores.sort(descending=True).values
                self.index_margin = min(self.index_margin, (ranked[k - 1] - ranked[k]).item())
            return original(scores, k, dim)

        return topk

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def forward(self, tokens: np.ndarray, cache: Cache) -> np.ndarray:
        """Return logits [tokens, vocabulary] after each of ``tokens``, and add the tokens to ``cache``."""
        inputs = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        with torch.inference_mode(), mock.patch.object(torch.Tensor, "topk", self._watch_index()):
            return self.model(inputs, cache=cache, use_cache=True).logits[0].numpy()

    def prefill_then_decode(self, tokens: np.ndarray, prompt_length: int) -> np.ndarray:
        """Return the logits after each of ``tokens``: one forward pass for the prompt, one for each further token."""
        cache = self.new_cache()
        rows = [self.forward(tokens[:prompt_length], cache)]
        rows += [self.forward(tokens[i : i + 1], cache) for i in range(prompt_length, len(tokens))]
        return np.concatenate(rows)

    def long_run(self, key: str, prompt_length: int, least_margin: float) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and logits of a random prompt of ``prompt_length`` tokens and its greedy continuation.

        Prompts are drawn until all experts are chosen by at least ``least_margin``.
        """
        for attempt in count():
            words = random_words(prompt_length, key, "prompt", attempt)
            run = self._greedy((words % np.uint64(self.model.vocab_size)).astype(np.int32), least_margin, 0.0)
            if run is not None:
                return run
        raise AssertionError("unreachable")

    def unambiguous_run(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and logits of a prompt and its greedy continuation without close choices.

        Random prompts, which depend only on ``key``, are drawn until all experts and tokens are chosen by a clear
        margin.
        """
        for attempt in count():
            words = random_words(PROMPT_LENGTH, key, "prompt", attempt)
            run = self._greedy((words % np.uint64(self.model.vocab_size)).astype(np.int32))
            if run is not None:
                return run
        raise AssertionError("unreachable")

    def _greedy(
        self, prompt: np.ndarray, least_routing: float = ROUTING_MARGIN, least_argmax: float = ARGMAX_MARGIN
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return tokens and logits; None if an expert or a token is chosen by less than its margin."""
        cache = self.new_cache()
        self.routing_margin = self.index_margin = float("inf")
        tokens, rows, step = [prompt], [], prompt
        for _ in range(DECODE_STEPS + 1):
            rows.append(self.forward(step, cache))
            close = self.routing_margin < least_routing or self.index_margin < INDEX_MARGIN
            if argmax_margin(rows[-1]) < least_argmax or close:
                return None
            step = rows[-1][-1:].argmax(-1).astype(np.int32)
            tokens.append(step)
        return np.concatenate(tokens[:-1]), np.concatenate(rows)


def argmax_margin(logits: np.ndarray) -> float:
    """Return the smallest difference between the logits of the best and the second best token."""
    second, best = np.partition(logits, (-2, -1), axis=-1)[:, -2:].T
    return float((best - second).min())
