"""Measure the speed of decoding with and without a watcher of the observatory, in turns; print a table in Markdown.

    python tools/measure_watching.py                    # the demo model
    python tools/measure_watching.py --model my-pack --backend ram_hybrid

One server answers the same short greedy request again and again, in the order A B B A: without a watcher, and with one
that reads the feed in another process. Answers are short so that both of a pair meet the same load of the machine. The
table compares three times of a token: the median pass of an answer, the mean time between tokens as a client
sees it, and the processor time of the server.
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
from typing import Any

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings

_WATCHER = """
import socket, sys, threading, urllib.request
def read(feed):
    try:
        while feed.read1():
            pass
    except OSError:
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

_TIMES = ("median pass", "as a client sees it", "processor time of the server")


def decode_seconds(url: str, tokens: int) -> float:
    """Ask for a streamed answer of ``tokens`` tokens; return the seconds from its first token to its last."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": "Tell me something about yourself."}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(  # noqa: S310  # the address is that of the server below
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        times = [time.perf_counter() for line in answer if line.startswith(b"data: {") and b'content":"' in line]
    return times[-1] - times[0]


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder()))
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=60, help="pairs of runs without and with a watcher")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    service = Service(
        lambda: load(arguments.model, arguments.backend), Settings("model", together=1, record=records.append)
    )
    listener = listening_socket("127.0.0.1", 0)
    server, ready = HttpServer(service, Policy()), threading.Event()
    thread = threading.Thread(target=server.run, args=(listener, ready.set))
    thread.start()
    ready.wait()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    times: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in _TIMES}
    command = [sys.executable, "-c", _WATCHER, url + "/observatory/events"]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    try:
        for _ in range(4):
            decode_seconds(url, arguments.tokens)  # warm
        for repeat in range(arguments.repeats):
            for watched in (False, True) if repeat % 2 == 0 else (True, False):
                if watched:
                    print("begin", file=watcher.stdin, flush=True)
                    watcher.stdout.readline()
                    while not service.observatory.watchers:
                        time.sleep(0.001)
                cpu = time.process_time()
                seconds = decode_seconds(url, arguments.tokens)
                cpu = time.process_time() - cpu
                if watched:
                    print("end", file=watcher.stdin, flush=True)
                while service.worker.running or service.observatory.watchers:
                    time.sleep(0.002)
                decode = records[-1]["decode"]
                found = (decode["step_seconds"]["p50"], seconds / decode["tokens"], cpu / decode["tokens"])
                for name, value in zip(_TIMES, found, strict=True):
                    times[name][watched].append(1000 * value)
    finally:
        watcher.kill()
        watcher.communicate()
        server.stop()
        thread.join()
    made = " on " + native.in_use() if native.extension() else ""
    print(f"{arguments.tokens} tokens, backend {arguments.backend}{made}\n")
    print("| milliseconds of a token | without a watcher | with a watcher | change, median of pairs | 95 % interval |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        changes = sorted(100 * (b / a - 1) for a, b in zip(values[False], values[True], strict=True))
        reach = 0.98 * math.sqrt(len(changes))  # the interval of the median by its ranks
        low, high = (changes[round((len(changes) - 1) / 2 + sign * reach)] for sign in (-1, 1))
        medians = [statistics.median(values[watched]) for watched in (False, True)]
        middle = statistics.median(changes)
        print(f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {middle:+.2f} % | {low:+.2f} to {high:+.2f} % |")


if __name__ == "__main__":
    main()
