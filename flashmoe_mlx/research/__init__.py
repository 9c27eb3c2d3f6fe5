"""Comparing, recording, replaying and predicting: what the engine is measured with."""

from flashmoe_mlx.research.runs import load_runs

__all__ = ["load_runs"]
