"""Measure answers through HTTP and from the Python API, in turns; print a table in Markdown.

    python tools/measure_http.py                                   # the demo model, 60 seconds
    python tools/measure_http.py --layers 8 --backend resident     # random weights, some ms a token
    python tools/measure_http.py --seconds 300 --tokens 200

One process loads the model, and serves it with the defaults of ``task=serve``. This process is the client, which loads
no model. It asks the server for streams of the chat API and for whole answers, and the other process for answers of the
Python API, while the server is idle. Both use the same engine, because the speeds of two processes with the same model
differ by several percent, for as long as they live. The Python API is measured twice; the second one shows the noise.

All sides answer the same prompt greedily and must give the same text. The prompt cache is off. Each round asks all
sides once, in random order; a ratio is that of a round, with a 95 % interval of the median over the rounds. Rounds end
after ``--seconds``, but not before the fifth.

The demo model's answers are short, so its ends are forbidden, and tokens are chosen on the host. With ``--layers``,
tokens are chosen as in an ordinary greedy answer: on a GPU that holds all experts, on the device.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from flashmoe_mlx import Engine, load
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.intervals import format_interval, median_interval
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings
from flashmoe_mlx.text.tokenizer import Tokenizer

_PROMPT = [{"role": "user", "content": "Tell me about the village of Larkrise and the people who live there."}]
_UNMEASURED, _FEWEST = 2, 5
"""Rounds before the measured ones, and the smallest number of measured ones."""
_LONGEST_LOAD = 300.0
_BASELINE = "Python API"


@dataclass(frozen=True)
class Taken:
    """An answer: seconds until its first text, seconds until its end, its text, and the number of its tokens."""

    first: float
    seconds: float
    text: str
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second of the whole answer."""
        return self.tokens / self.seconds

    @property
    def later_rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.tokens - 1) / (self.seconds - self.first)


Side = Callable[[], Taken]


def serve(connection: Connection, folder: Path, backend: str, options: Mapping[str, Any]) -> None:
    """Serve the model, send the port, and answer from the Python API for each message; None ends it."""
    listener = listening_socket("127.0.0.1", 0)
    service = Service(lambda: load(folder, backend, prompt_cache_gib=0), Settings("any"))
    http = HttpServer(service, Policy(()))

    def answer_messages() -> None:
        connection.send(listener.getsockname()[1])
        while connection.recv() is not None:
            connection.send(ask_python(service.engine, options))
        http.stop()

    http.run(listener, Thread(target=answer_messages).start)


def ask_python(engine: Engine, options: Mapping[str, Any]) -> Taken:
    """Answer from the Python API."""
    start = time.perf_counter()
    first, parts, tokens = 0.0, [], 0
    for piece in engine.generate(_PROMPT, enable_thinking=False, **options):
        if piece.text:
            first = first or time.perf_counter() - start
        parts.append(piece.text)
        tokens += len(piece.token_ids)
    return Taken(first, time.perf_counter() - start, "".join(parts), tokens)


@contextmanager
def serving(folder: Path, backend: str, options: Mapping[str, Any]) -> Iterator[tuple[int, Side]]:
    """Give the port of a server in another process, and a side that asks the Python API there."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, folder, backend, options), daemon=True)
    process.start()
    there.close()  # so that the end of the process ends this connection
    try:
        if not here.poll(_LONGEST_LOAD):
            raise SystemExit(f"the model was not loaded in {_LONGEST_LOAD:g} seconds")
        port = here.recv()

        def ask() -> Taken:
            here.send(True)
            taken = here.recv()
            assert isinstance(taken, Taken)
            return taken

        yield port, ask
        here.send(None)
        process.join(30)
    finally:
        process.kill()


def ask_http(port: int, options: Mapping[str, Any], *, stream: bool) -> Taken:
    """Ask the server for an answer."""
    body = {"model": "any", "messages": _PROMPT, "stream": stream, "reasoning_effort": "none", **options}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, parts, tokens = 0.0, [], 0
    if stream:
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                text = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if text:
                    first = first or time.perf_counter() - start
                    parts.append(text)
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    else:
        answer = json.loads(response.read())
        parts.append(answer["choices"][0]["message"]["content"])
        tokens = answer["usage"]["completion_tokens"]
    seconds = time.perf_counter() - start
    connection.close()
    return Taken(first, seconds, "".join(parts), tokens)


def measure(sides: Mapping[str, Side], seconds: float) -> dict[str, list[Taken]]:
    """Ask all sides in turns for ``seconds``."""
    for _ in range(_UNMEASURED):
        texts = {name: side().text for name, side in sides.items()}
    expected = texts[_BASELINE]
    if set(texts.values()) != {expected}:
        raise SystemExit(f"the texts differ: {texts}")
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    end, order = time.monotonic() + seconds, list(sides)
    while time.monotonic() < end or len(taken[_BASELINE]) < _FEWEST:
        random.shuffle(order)
        for name in order:
            taken[name].append(sides[name]())
            assert taken[name][-1].text == expected
    return taken


def print_table(taken: Mapping[str, list[Taken]]) -> None:
    """Print the medians of all sides, and the medians of their ratios."""
    baseline = taken[_BASELINE]
    print(f"{len(baseline)} rounds, {baseline[0].tokens} tokens an answer\n")
    print(
        "| | tok/s of the whole answer | relative to the Python API | tok/s after the first token | relative |", end=""
    )
    print(" ms until the first text |\n|---|---|---|---|---|---|")
    for name, answers in taken.items():
        pairs = list(zip(answers, baseline, strict=True))
        rate = statistics.median(answer.rate for answer in answers)
        cells = [f"{rate:.1f}", _ratio([own.rate / other.rate for own, other in pairs])]
        if answers[0].first:
            cells.append(f"{statistics.median(answer.later_rate for answer in answers):.1f}")
            cells.append(_ratio([own.later_rate / other.later_rate for own, other in pairs]))
            cells.append(f"{1000 * statistics.median(answer.first for answer in answers):.1f}")
        else:
            cells += ["", "", ""]
        print(f"| {name} | {' | '.join(cells)} |")


def _ratio(ratios: list[float]) -> str:
    if set(ratios) == {1.0}:
        return "1"
    return f"{statistics.median(ratios):.3f}{format_interval(median_interval(ratios))}"


def main() -> None:
    """Load the model in all processes, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="time of the rounds, without loading")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--layers", type=int, help="layers of a model with random weights, each of 64 experts of 35B's")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        options: dict[str, Any] = {"max_tokens": arguments.tokens, "temperature": 0}
        if arguments.layers is None:
            folder = demo_folder()
            options["logit_bias"] = {str(token): -100 for token in Tokenizer.load(folder).eos_token_ids}
        else:
            sizes = replace(SIZES["small"], num_layers=arguments.layers)
            cache_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder = synthetic_pack("http", sizes, cache_dir).folder
        port, python = stack.enter_context(serving(folder, arguments.backend, options))
        sides = {
            _BASELINE: python,
            "Python API again": python,
            "HTTP, streamed": partial(ask_http, port, options, stream=True),
            "HTTP, not streamed": partial(ask_http, port, options, stream=False),
        }
        print_table(measure(sides, arguments.seconds))


if __name__ == "__main__":
    main()
