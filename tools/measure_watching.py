"""Measure the speed of decoding with and without a watcher of the observatory, in turns; print a table in Markdown.

    python tools/measure_watching.py                    # the demo model
    python tools/measure_watching.py --model my-pack --backend ram_hybrid

One server decodes long greedy answers. After each block of tokens a watcher, which reads the feed in another process,
comes or goes, in the order A B B A, so that both blocks of a pair meet the same load of the machine. The first tokens
after a change do not count. The table compares the mean time between tokens as a client sees it, and the processor
time of the server.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.observatory import describe
from flashmoe_mlx.server.service import Service, Settings

_WATCHER = """
import http.client, socket, sys, threading, urllib.request
def read(feed):
    try:
        while feed.read1():
            pass
    except (OSError, http.client.IncompleteRead):
        pass
for line in sys.stdin:
    feed = urllib.request.urlopen(sys.argv[1])
    reader = threading.Thread(target=read, args=(feed,))
    reader.start()
    print(flush=True)
    sys.stdin.readline()
    feed.fp.raw._sock.shutdown(socket.SHUT_RDWR)
    reader.join()
"""
"""A process that watches from one line of its input to the next one."""

_TIMES = ("as a client sees it", "processor time of the server")
_SKIPPED = 6
"""Number of tokens after a change that do not count."""


class Watcher:
    """A process that watches from ``begin`` to ``end``."""

    def __init__(self, url: str, service: Service) -> None:
        self._service = service
        command = [sys.executable, "-c", _WATCHER, url + "/observatory/events"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours

    def watch(self, watched: bool) -> None:
        """Begin or end to watch."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if watched == bool(self._service.observatory.watchers):
            return
        print("begin" if watched else "end", file=stdin, flush=True)
        if watched:
            stdout.readline()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def progress(url: str, service: Service, tokens: int) -> Iterator[float]:
    """Ask for an answer of ``tokens`` tokens, and yield the decoded tokens at each of its events.

    An event may bring several tokens, so they are counted by the store's requests; the pass in progress counts in part.
    """
    shape = describe(service.engine)
    requests_of_token = shape["layers"] * shape["experts_k"]
    before = None
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": "Tell me something about yourself."}],
        "max_tokens": tokens,
        "temperature": 0,
        "min_tokens": tokens,
        "stream": True,
    }
    request = urllib.request.Request(  # noqa: S310  # the address is that of the server below
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        for line in answer:
            if line.startswith(b"data: {") and b'content":"' in line:
                requests = service.engine.store.stats().requests
                before = requests if before is None else before
                yield (requests - before) / requests_of_token


def block_times(url: str, service: Service, watcher: Watcher, block: int, blocks: int) -> dict[bool, list[list[float]]]:
    """Decode one answer of ``blocks`` blocks in the order A B B A; return the times of ``_TIMES`` of a token."""
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    watched = False
    watcher.watch(watched)
    number = 0
    begun: tuple[float, float, float] | None = None
    for tokens in progress(url, service, blocks * block + 2):
        now = tokens, time.perf_counter(), time.process_time()
        if begun is not None and tokens >= (number + 1) * block:
            times[watched].append([1000 * (now[part] - begun[part]) / (now[0] - begun[0]) for part in (1, 2)])
            number, begun = number + 1, None
            watched = (number + 1) % 4 >= 2
            watcher.watch(watched)
        elif begun is None and tokens >= number * block + _SKIPPED:
            begun = now
    return times


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder()))
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--block", type=int, default=48, help="tokens between two changes")
    parser.add_argument("--blocks", type=int, default=20, help="blocks in an answer; a multiple of 4")
    parser.add_argument("--repeats", type=int, default=16, help="answers")
    arguments = parser.parse_args()
    service = Service(lambda: load(arguments.model, arguments.backend), Settings("model", together=1))
    listener = listening_socket("127.0.0.1", 0)
    server, ready = HttpServer(service, Policy()), threading.Event()
    thread = threading.Thread(target=server.run, args=(listener, ready.set))
    thread.start()
    ready.wait()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    watcher = Watcher(url, service)
    try:
        for _ in progress(url, service, 4 * arguments.block):  # warm
            pass
        for _ in range(arguments.repeats):
            found = block_times(url, service, watcher, arguments.block, arguments.blocks)
            for watched, blocks in found.items():
                times[watched] += blocks
    finally:
        watcher.close()
        server.stop()
        thread.join()
    made = " on " + native.in_use() if native.extension() else ""
    print(f"{len(times[True])} pairs of blocks of {arguments.block} tokens, backend {arguments.backend}{made}\n")
    print("| milliseconds of a token | without a watcher | with a watcher | change, median of pairs | 95 % interval |")
    print("|---|---|---|---|---|")
    for column, name in enumerate(_TIMES):
        values = {watched: [block[column] for block in blocks] for watched, blocks in times.items()}
        changes = sorted(100 * (b / a - 1) for a, b in zip(values[False], values[True], strict=True))
        reach = 0.98 * math.sqrt(len(changes))  # the interval of the median by its ranks
        low, high = (changes[round((len(changes) - 1) / 2 + sign * reach)] for sign in (-1, 1))
        medians = [statistics.median(values[watched]) for watched in (False, True)]
        middle = statistics.median(changes)
        print(f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {middle:+.2f} % | {low:+.2f} to {high:+.2f} % |")


if __name__ == "__main__":
    main()
