"""Measure requests answered together and one after the other, in turns; print a table in Markdown.

    python tools/measure_batch.py                       # 64 requests on the demo model
    python tools/measure_batch.py --backend resident --repeats 3

Every repetition answers all requests one after the other, with fixed numbers at once, and with the number that
``task=batch`` chooses, in alternating order, on one loaded engine. A time includes prompts, sampling and the conversion
to text. The last column counts the answers that equal those of each request alone up to their end. All do on CPUs; on a
GPU, kernels for several rows round differently. Every request gets ``--tokens`` tokens, also behind its end.
"""

import argparse
import statistics
import time
from collections.abc import Collection

import mlx.core as mx

from flashmoe_mlx import Engine, load
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.generation.concurrency import Concurrency, run_all
from flashmoe_mlx.generation.text_stream import TextStream
from flashmoe_mlx.made_models.demo import demo_folder


def answers(
    engine: Engine, prompts: list[str], together: int | None, tokens: int
) -> tuple[float, tuple[list[list[int]], list[str]], int]:
    """Answer ``prompts`` greedily; return the seconds, the tokens and texts, and how many requests ran at once."""
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
    found = [sequence.token_ids for sequence in sequences], ["".join(parts) for _, parts in texts.values()]
    return seconds, found, concurrency.most


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
    most, same = dict.fromkeys(counts, 0), dict.fromkeys(counts, arguments.requests)
    on_gpu = mx.default_device() == mx.gpu
    with load(arguments.model, arguments.backend, prompt_cache_gib=0) as engine:
        made = " on " + native.in_use() if native.extension() else ""
        for count in counts:  # nothing is compiled in a measured time
            answers(engine, prompts[: count or len(prompts)], count, 2)
        _, alone, _ = answers(engine, prompts, 1, arguments.tokens)
        eos = engine.tokenizer.eos_token_ids
        for repeat in range(arguments.repeats):
            for count in counts if repeat % 2 == 0 else reversed(counts):
                seconds, found, most[count] = answers(engine, prompts, count, arguments.tokens)
                assert on_gpu or found == alone, f"{count} at once changed an answer"
                rates[count].append(arguments.requests * arguments.tokens / seconds)
                pairs = zip(found[0], alone[0], strict=True)
                same[count] = min(same[count], sum(_answer(one, eos) == _answer(other, eos) for one, other in pairs))
    print(f"{arguments.requests} requests of {arguments.tokens} tokens{made}\n")
    print("| at once | tok/s, median | least | most | times one after the other, median of pairs | equal answers |")
    print("|---|---|---|---|---|---|")
    for count, measured in rates.items():
        ratio = statistics.median(rate / single for rate, single in zip(measured, rates[1], strict=True))
        print(
            f"| {f'chosen, up to {most[count]}' if count is None else count} | {statistics.median(measured):.0f} "
            f"| {min(measured):.0f} | {max(measured):.0f} | {ratio:.2f} | {same[count]} of {arguments.requests} |"
        )


def _answer(tokens: list[int], eos: Collection[int]) -> list[int]:
    """Return the tokens before the first of ``eos``."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in eos), None)]


if __name__ == "__main__":
    main()
