"""Research tools: benchmarks, routing traces, speed estimates, quality, and the records of all runs."""

from flashmoe_mlx.research.runs import load_runs

__all__ = ["load_runs"]
