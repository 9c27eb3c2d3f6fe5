"""Run Mixture-of-Experts models larger than memory, reading the experts of each token from storage."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe_mlx.version import __version__

if TYPE_CHECKING:
    from flashmoe_mlx.engine import Engine, Generation, Piece, Request, RequestOptions, load

__all__ = ["Engine", "Generation", "Piece", "Request", "RequestOptions", "__version__", "load"]

# In a source checkout three subpackages lie beside this folder, under the names that people look for. An installed
# package has them inside; this keeps `python -m flashmoe_mlx` working in the checkout, where this folder hides the
# installed one.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "backends" / "pread.py").is_file():
    __path__.append(str(_checkout))


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for, so that the command line can explain a missing MLX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashmoe_mlx import engine

    return getattr(engine, name)
