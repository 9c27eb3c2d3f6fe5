"""The files of the benchmarked experts, and the share of them in the page cache."""

from collections.abc import Sequence
from pathlib import Path

from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.stores.page_cache import cached_bytes


def expert_files(source: ExpertSource) -> list[Path]:
    """Return the files that hold the experts of ``source``, sorted."""
    experts = ((layer, expert) for layer in range(source.num_layers) for expert in range(source.num_experts))
    return sorted({extent.path for layer, expert in experts for extent in source.extents(layer, expert)})


def cached_share(files: Sequence[Path]) -> float:
    """Return the share of the bytes of ``files`` that the page cache holds."""
    return sum(map(cached_bytes, files)) / sum(path.stat().st_size for path in files)
