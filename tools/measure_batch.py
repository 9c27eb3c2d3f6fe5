"""Measure requests answered together and one after the other, in turns; print a table in Markdown.

    python tools/measure_batch.py                       # 64 requests on the demo model
    python tools/measure_batch.py --together 64 --repeats 5

Every repetition answers all requests with each number of requests at once, in alternating order, on one loaded engine,
and compares the tokens with those of each request alone. They are equal on CPUs; on a GPU, kernels for several rows
round differently, and the table counts the answers that are equal up to their end. Every request gets ``--tokens``
tokens, also behind the end of its answer. A time includes prompts, sampling and the conversion to text.
"""

import argparse
import statistics
import time
from collections.abc import Collection

import mlx.core as mx

from flashmoe_mlx import Engine, load
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.text_stream import TextStream
from flashmoe_mlx.made_models.demo import demo_folder


def answers(engine: Engine, prompts: list[str], together: int, tokens: int) -> tuple[float, list[list[int]], list[str]]:
    """Answer ``prompts`` greedily, ``together`` at once; return the seconds, the tokens and the texts."""
    start = time.perf_counter()
    sequences = [
        engine.runner.begin(engine.request(prompt, max_tokens=tokens, temperature=0, ignore_eos=True))
        for prompt in prompts
    ]
    texts = {sequence: (TextStream(sequence, engine.tokenizer), list[str]()) for sequence in sequences}
    scheduler = Scheduler(engine.runner, together)
    for sequence in sequences:
        scheduler.add(sequence)
    with engine.runner.exclusive():
        while scheduler.unfinished:
            for change in scheduler.step():
                stream, parts = texts[change.sequence]
                piece = stream.take()
                if piece is not None:
                    parts += [piece.reasoning, piece.text]
    seconds = time.perf_counter() - start
    return seconds, [sequence.token_ids for sequence in sequences], ["".join(parts) for _, parts in texts.values()]


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder()))
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--together", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    prompts = [f"What is {17 * n % 50} plus {29 * n % 50}?" for n in range(arguments.requests)]
    counts = [1, *arguments.together]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    same: dict[int, int] = {}
    on_gpu = mx.default_device() == mx.gpu
    with load(arguments.model, arguments.backend, prompt_cache_gib=0) as engine:
        made = " on " + native.in_use() if native.extension() else ""
        _, expected, texts = answers(engine, prompts, 1, arguments.tokens)
        for repeat in range(arguments.repeats):
            for count in counts if repeat % 2 == 0 else reversed(counts):
                seconds, tokens, found = answers(engine, prompts, count, arguments.tokens)
                assert on_gpu or (tokens, found) == (expected, texts), f"{count} at once changed an answer"
                rates[count].append(sum(map(len, tokens)) / seconds)
                same[count] = sum(
                    _answer(one, engine.tokenizer.eos_token_ids) == _answer(other, engine.tokenizer.eos_token_ids)
                    for one, other in zip(tokens, expected, strict=True)
                )
    print(f"{arguments.requests} requests of {arguments.tokens} tokens{made}\n")
    print("| at once | tok/s, median | least | most | times one after the other, median of pairs | equal answers |")
    print("|---|---|---|---|---|---|")
    for count, found_rates in rates.items():
        ratio = statistics.median(rate / alone for rate, alone in zip(found_rates, rates[1], strict=True))
        print(
            f"| {count} | {statistics.median(found_rates):.0f} | {min(found_rates):.0f} | {max(found_rates):.0f} "
            f"| {ratio:.2f} | {same[count]} of {arguments.requests} |"
        )


def _answer(tokens: list[int], eos: Collection[int]) -> list[int]:
    """Return the tokens before the first of ``eos``."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in eos), None)]


if __name__ == "__main__":
    main()
