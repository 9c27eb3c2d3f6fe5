"""Measure an answer through HTTP and from the Python API, in turns; print a table in Markdown.

    python tools/measure_http.py                      # the demo model
    python tools/measure_http.py --repeats 20 --tokens 200

The server is a process with the settings of ``task=serve``; its answer is a stream of the chat API, whose chunks are
parsed. Both sides answer the same prompt greedily, with the same number of tokens, and must give the same text. Prompt
caches are off. Every repetition measures both sides, in alternating order; the ratio is that of each repetition.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from flashmoe_mlx import Engine, load
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.intervals import format_interval, median_interval

_PROMPT = [{"role": "user", "content": "Tell me about the village of Larkrise and the people who live there."}]
_UNMEASURED = 3
"""Repetitions before the measured ones."""


def options(engine: Engine, tokens: int) -> dict[str, Any]:
    """Return options that make an answer exactly ``tokens`` long: its ends are forbidden."""
    ends = {str(token): -100 for token in engine.tokenizer.eos_token_ids}
    return {"max_tokens": tokens, "temperature": 0, "logit_bias": ends}


def by_python(engine: Engine, chosen: dict[str, Any]) -> tuple[float, float, str]:
    """Return the seconds until the first text, the seconds of the whole answer, and its text."""
    start = time.perf_counter()
    first, parts = 0.0, []
    for piece in engine.generate(_PROMPT, enable_thinking=False, **chosen):
        first = first or time.perf_counter() - start
        parts.append(piece.text)
    return first, time.perf_counter() - start, "".join(parts)


def by_http(client: httpx2.Client, chosen: dict[str, Any]) -> tuple[float, float, str]:
    """Return the same as ``by_python``, through the server of ``client``."""
    start = time.perf_counter()
    first, parts = 0.0, []
    body = {"model": "demo", "messages": _PROMPT, "stream": True, "reasoning_effort": "none", **chosen}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                text = delta.get("content") or ""
                if text:
                    first = first or time.perf_counter() - start
                    parts.append(text)
    return first, time.perf_counter() - start, "".join(parts)


def measure(client: httpx2.Client, engine: Engine, tokens: int, repeats: int) -> None:
    """Measure both sides in turns and print the table."""
    chosen = options(engine, tokens)
    sides = {"Python API": lambda: by_python(engine, chosen), "HTTP": lambda: by_http(client, chosen)}
    for _ in range(_UNMEASURED):
        expected = {name: side()[2] for name, side in sides.items()}
    assert len(set(expected.values())) == 1, expected
    firsts: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(list(sides)):
            first, seconds, text = sides[name]()
            assert text == expected[name]
            firsts[name].append(first)
            rates[name].append(tokens / seconds)
    print(f"{repeats} repetitions of {tokens} tokens\n")
    print("| | tok/s of the whole answer, median | least | most | ms until the first text, median |")
    print("|---|---|---|---|---|")
    for name, values in rates.items():
        middle, first = statistics.median(values), statistics.median(firsts[name])
        print(f"| {name} | {middle:.1f} | {min(values):.1f} | {max(values):.1f} | {1000 * first:.1f} |")
    ratios = [http / python for http, python in zip(rates["HTTP"], rates["Python API"], strict=True)]
    interval = format_interval(median_interval(ratios))
    print(
        f"\nspeed through HTTP relative to the Python API, median of pairs: {statistics.median(ratios):.3f}{interval}"
    )


def main() -> None:
    """Serve the model in a process, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flashmoe_mlx", "task=serve", "server.port=0", "prompt_cache_gib=0"]
        log = Path(folder) / "output.txt"
        with log.open("wb") as output:
            server = subprocess.Popen([*command, f"hydra.run.dir={folder}"], stdout=output, stderr=output)  # noqa: S603
        try:
            while "ready:" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            url = next(line for line in log.read_text().splitlines() if "listening on" in line).split()[-1]
            with httpx2.Client(base_url=url, timeout=60) as client, load(demo_folder(), prompt_cache_gib=0) as engine:
                measure(client, engine, arguments.tokens, arguments.repeats)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
