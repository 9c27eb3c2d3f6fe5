"""Lines that describe a routing trace."""

from collections.abc import Iterator

from flashmoe_mlx.console.output import counted
from flashmoe_mlx.research.traces.routing import RoutingSummary


def routing_lines(summary: RoutingSummary, prompt_tokens: int) -> Iterator[str]:
    """Yield lines about the size of a trace, the skew of its choices, and their repetition.

    Args:
        summary: the statistics of the trace.
        prompt_tokens: number of its tokens that belong to the prompt.
    """
    yield (
        f"{counted(summary.tokens, 'token')}, {prompt_tokens} of them in the prompt, chose {summary.experts_k} of "
        f"{summary.num_experts} experts in each of {counted(summary.layers, 'layer')}"
    )
    yield (
        f"skew: the busiest tenth of the experts receives {summary.top_share:.0%} of the choices; as uneven as "
        f"{summary.effective_experts:.0f} equally likely experts"
    )
    if summary.overlap is not None:
        yield f"overlap with the previous token: {summary.overlap:.0%} (by chance {summary.chance_overlap:.0%})"
    if summary.reuse is not None:
        yield (
            f"reuse: {1 - summary.first_time:.0%} of the choices repeat an earlier choice, half of them within "
            f"{summary.reuse[0]:.0f} tokens, nine in ten within {summary.reuse[1]:.0f}"
        )
