"""The engine of a chat, which is loaded again when the backend or the number of experts changes."""

from collections.abc import Mapping
from typing import Any, Protocol

from flashmoe_mlx.engine import Engine

Backend = str | Mapping[str, Any]


class Opener(Protocol):
    """A function that loads the model of a chat."""

    def __call__(self, backend: Backend, experts_k: int | None) -> Engine:
        """Load the model with a backend and a number of experts per token, as in ``flashmoe_mlx.load``."""
        ...


class Engines:
    """At most one engine at a time.

    Args:
        opener: loads the model.
        backend: the first backend.
        experts_k: the first number of experts per token; None for the model's own number.
    """

    def __init__(self, opener: Opener, backend: Backend, experts_k: int | None) -> None:
        self._opener = opener
        self._chosen = backend, experts_k
        self._engine: Engine | None = None

    @property
    def current(self) -> Engine:
        """The engine; it is loaded if there is none."""
        if self._engine is None:
            self._engine = self._opener(*self._chosen)
        return self._engine

    @property
    def loaded(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    def change_backend(self, backend: Backend) -> None:
        """Load the model with another backend; after an error or an interrupt, the earlier one stays chosen."""
        self._change(backend, self._chosen[1])

    def change_experts(self, experts_k: int | None) -> None:
        """Load the model with another number of experts per token; after an error, the earlier one stays chosen."""
        self._change(self._chosen[0], experts_k)

    def _change(self, backend: Backend, experts_k: int | None) -> None:
        self.close()  # two engines may not fit into memory
        self._engine = self._opener(backend, experts_k)
        self._chosen = backend, experts_k

    def close(self) -> None:
        """Close the engine."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
