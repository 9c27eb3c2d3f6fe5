"""Measure requests answered together and one after the other, in turns; print a table in Markdown.

    python tools/measure_batch.py                       # 64 requests on the demo model
    python tools/measure_batch.py --backend resident --repeats 3

Every repetition answers all requests one after the other, with fixed numbers at once, and with the number that
``task=batch`` chooses, in alternating order, on one loaded engine. A time includes prompts, sampling and the conversion
to text. The last column counts the answers that differ from those of each request alone.
"""

import argparse
import statistics
import time

from flashmoe_mlx import Engine, load
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.generation.concurrency import Concurrency, run_all
from flashmoe_mlx.generation.text_stream import TextStream
from flashmoe_mlx.made_models.demo import demo_folder


def answers(engine: Engine, prompts: list[str], together: int | None, tokens: int) -> tuple[float, list[str], int]:
    """Answer ``prompts`` greedily, ``together`` at once; return the seconds, the texts, and how many ran at once."""
    start = time.perf_counter()
    runner = engine.runner
    sequences = [
        runner.begin(engine.request(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)) for prompt in prompts
    ]
    texts = {sequence: (TextStream(sequence, engine.tokenizer), list[str]()) for sequence in sequences}
    concurrency = Concurrency(runner, together)
    for change in run_all(runner, iter(sequences), concurrency):
        stream, parts = texts[change.sequence]
        piece = stream.take()
        if piece is not None:
            parts += [piece.reasoning, piece.text]
    seconds = time.perf_counter() - start
    return seconds, ["".join(parts) for _, parts in texts.values()], concurrency.most


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder()))
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--together", type=int, nargs="*", default=[16, 64], help="fixed numbers to compare")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    prompts = [f"What is {17 * n % 50} plus {29 * n % 50}?" for n in range(arguments.requests)]
    counts = [1, *arguments.together, None]
    rates: dict[int | None, list[float]] = {count: [] for count in counts}
    most, differ = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    with load(arguments.model, arguments.backend, prompt_cache_gib=0) as engine:
        made = " on " + native.in_use() if native.extension() else ""
        for count in counts:  # nothing is compiled in a measured time
            answers(engine, prompts[: count or len(prompts)], count, 2)
        alone: list[str] | None = None
        for repeat in range(arguments.repeats):
            for count in counts if repeat % 2 == 0 else reversed(counts):
                seconds, texts, most[count] = answers(engine, prompts, count, arguments.tokens)
                rates[count].append(arguments.requests * arguments.tokens / seconds)
                alone = alone or texts
                differ[count] = max(differ[count], sum(a != b for a, b in zip(texts, alone, strict=True)))
    print(f"{arguments.requests} requests of {arguments.tokens} tokens{made}\n")
    print(
        "| at once | tok/s, median | least | most | times one after the other, median of pairs | answers that differ |"
    )
    print("|---|---|---|---|---|---|")
    for count, found in rates.items():
        ratio = statistics.median(rate / single for rate, single in zip(found, rates[1], strict=True))
        print(
            f"| {f'chosen, up to {most[count]}' if count is None else count} | {statistics.median(found):.0f} "
            f"| {min(found):.0f} | {max(found):.0f} | {ratio:.2f} | {differ[count]} |"
        )


if __name__ == "__main__":
    main()
