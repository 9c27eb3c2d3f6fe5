"""Measure a turn of a conversation with and without the prompt cache; print rows of a table in Markdown.

    python tools/measure_turn.py known --pack <folder> --cache-dir <folder>
    python tools/measure_turn.py cached --pack <folder> --cache-dir <folder>
    python tools/measure_turn.py fresh --pack <folder>

``known`` computes the beginning of the conversation and keeps it in ``--cache-dir``. ``cached`` continues it there in
a new process, and ``fresh`` computes the whole prompt. Both choose the same first token. Prompts are random letters,
so that routing is more even than in text. Choose direct reads, as by default, or evict the pack from the page cache.
"""

import argparse
from pathlib import Path

import numpy as np
from measure_prefill import options_of

from flashmoe_mlx.engine import load
from flashmoe_mlx.generation.metrics import process_peak_bytes


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("known", "cached", "fresh"))
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--known", type=int, default=12_800, help="tokens of the conversation so far")
    parser.add_argument("--new", type=int, default=1_500, help="tokens of the turn")
    parser.add_argument("--tokens", type=int, default=1, help="tokens of the answer")
    parser.add_argument("--experts-k", type=int)
    parser.add_argument("--options", default="backend=pread,direct=true", help="the backend that reads")
    parser.add_argument("--cache-dir", type=Path, help="folder of conversations; needed by known and cached")
    arguments = parser.parse_args()
    if arguments.cache_dir is None and arguments.way != "fresh":
        parser.error("--cache-dir is missing")
    letters = np.random.default_rng(0).integers(97, 123, arguments.known + arguments.new).tolist()
    text = bytes(letters[: arguments.known] if arguments.way == "known" else letters).decode()
    cache = {"cache_dir": arguments.cache_dir} if arguments.way != "fresh" else {}
    options = {"experts_k": arguments.experts_k, "prompt_cache_gib": 0, **cache, **options_of(arguments.options)}
    with load(arguments.pack, **options) as engine:
        generation = engine.generate(
            text, raw=True, temperature=0, max_tokens=1 if arguments.way == "known" else arguments.tokens
        )
        tokens = [token for piece in generation for token in piece.token_ids]
    metrics = generation.metrics
    prefill = metrics.prefill
    print("| | computed | reused | GB read | first token, s | of which fetches | first tokens | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.way} | {metrics.computed_tokens:,} | {metrics.reused_tokens:,} "
        f"| {prefill.store.bytes_read / 1e9:.2f} | {metrics.time_to_first_token:.1f} "
        f"| {prefill.store.fetch_seconds:.1f} | {tokens[:4]} | {process_peak_bytes() / 1e9:.2f} |"
    )


if __name__ == "__main__":
    main()
