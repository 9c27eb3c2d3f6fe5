"""Record the routing of a running model."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import xxhash

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.trace import RoutingTrace


class RoutingRecorder:
    """An observer that keeps the choices of ``num_layers`` layers in memory, two bytes per chosen expert."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._chosen: dict[int, list[npt.NDArray[np.uint16]]] = defaultdict(list)

    def __call__(self, layer: int, chosen: npt.NDArray[np.uint32]) -> None:
        """Append the experts [T, K] that ``layer`` chose for the next T tokens."""
        self._chosen[layer].append(chosen.astype(np.uint16))

    def trace(self, num_experts: int, prompt: Sequence[int], model: str = "", record_bytes: int = 0) -> RoutingTrace:
        """Return the trace of all recorded tokens.

        Tokens of an interrupted forward pass, which has not reached all layers, are left out.

        Args:
            num_experts: experts per layer.
            prompt: tokens with which the recorded sequence began.
            model: name of the model.
            record_bytes: bytes of one expert; 0 if unknown.

        Raises:
            InputError: no forward pass reached the last layer (code "nothing_recorded").
        """
        if len(self._chosen) < self._num_layers:
            raise InputError("no routing was recorded, because the model has not run", code="nothing_recorded")
        layers = [np.concatenate(self._chosen[layer]) for layer in sorted(self._chosen)]
        tokens = min(map(len, layers))
        experts = np.stack([layer[:tokens] for layer in layers], axis=1)
        prompt_tokens = min(len(prompt), tokens)
        return RoutingTrace(experts, num_experts, prompt_tokens, model, prompt_hash(prompt), record_bytes)


@contextmanager
def recorded(engine: Engine) -> Iterator[RoutingRecorder]:
    """Record the choices of all layers of ``engine`` inside the ``with`` block."""
    recorder = RoutingRecorder(engine.store.source.num_layers)
    engine.observe_routing(recorder)
    try:
        yield recorder
    finally:
        engine.observe_routing(None)


def prompt_hash(token_ids: Sequence[int]) -> str:
    """Return the hash of a prompt, by which a trace identifies it."""
    return xxhash.xxh3_64_hexdigest(np.array(token_ids, "<u4").tobytes())
