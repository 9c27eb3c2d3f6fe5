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
    """An observer that keeps the choices of all ``num_layers`` layers in memory, two bytes each."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._chosen: dict[int, list[npt.NDArray[np.uint16]]] = defaultdict(list)

    def __call__(self, layer: int, chosen: npt.NDArray[np.uint32]) -> None:
        """Append the experts [T, K] that ``layer`` chose for the next tokens."""
        self._chosen[layer].append(chosen.astype(np.uint16))

    def trace(self, num_experts: int, prompt: Sequence[int], model: str = "", record_bytes: int = 0) -> RoutingTrace:
        """Make a trace of everything recorded, of a sequence that began with the tokens ``prompt``.

        A pass that was cut short has reached some layers only; its tokens are left out.

        Raises:
            InputError: no pass reached the last layer; code "nothing_recorded".
        """
        if len(self._chosen) < self._num_layers:
            raise InputError("no routing was recorded: the model has not run", code="nothing_recorded")
        layers = [np.concatenate(self._chosen[layer]) for layer in sorted(self._chosen)]
        tokens = min(map(len, layers))
        experts = np.stack([layer[:tokens] for layer in layers], axis=1)
        prompt_tokens = min(len(prompt), tokens)
        return RoutingTrace(experts, num_experts, prompt_tokens, model, prompt_hash(prompt), record_bytes)


@contextmanager
def recorded(engine: Engine) -> Iterator[RoutingRecorder]:
    """Record the choices of ``engine`` inside the block; outside it costs nothing."""
    recorder = RoutingRecorder(engine.model.config.num_layers)
    engine.observe_routing(recorder)
    try:
        yield recorder
    finally:
        engine.observe_routing(None)


def prompt_hash(token_ids: Sequence[int]) -> str:
    """Return the hash by which a trace names its prompt."""
    return xxhash.xxh3_64_hexdigest(np.array(token_ids, "<u4").tobytes())
