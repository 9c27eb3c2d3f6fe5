"""Measure the speed of decoding with and without a watcher of the observatory, in turns; print a table in Markdown.

    python tools/measure_watching.py                    # the demo model
    python tools/measure_watching.py --model my-pack --backend ram_hybrid

One server answers the same greedy request again and again, in the order A B B A: without a watcher, and with one that
reads the feed in another process. The speed is that of the server's records: decoded tokens by the seconds of their
passes, and by the seconds from the first token to the last as a client sees them.
"""

import argparse
import json
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
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as feed:
    print(flush=True)
    while feed.read1():
        pass
"""


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
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12, help="pairs of runs without and with a watcher")
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
    speeds: dict[bool, list[float]] = {False: [], True: []}
    seen: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(2):
            decode_seconds(url, arguments.tokens)  # warm
        for repeat in range(arguments.repeats):
            for watched in (False, True) if repeat % 2 == 0 else (True, False):
                watcher = None
                if watched:
                    command = [sys.executable, "-c", _WATCHER, url + "/observatory/events"]
                    watcher = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603  # our own program
                    assert watcher.stdout is not None
                    watcher.stdout.readline()
                seconds = decode_seconds(url, arguments.tokens)
                if watcher is not None:
                    watcher.kill()
                    watcher.communicate()
                while service.worker.running or service.observatory.watchers:
                    time.sleep(0.01)
                speeds[watched].append(records[-1]["decode"]["tokens_per_second"])
                seen[watched].append(records[-1]["decode"]["tokens"] / seconds)
    finally:
        server.stop()
        thread.join()
    made = " on " + native.in_use() if native.extension() else ""
    print(f"{arguments.tokens} tokens, backend {arguments.backend}{made}\n")
    print("| decoding | without a watcher, tok/s | with a watcher, tok/s | change, median of pairs | quartiles |")
    print("|---|---|---|---|---|")
    for name, found in (("passes alone", speeds), ("as a client sees it", seen)):
        changes = [100 * (with_one / alone - 1) for alone, with_one in zip(found[False], found[True], strict=True)]
        low, middle, high = statistics.quantiles(changes, n=4)
        medians = [statistics.median(found[watched]) for watched in (False, True)]
        print(f"| {name} | {medians[0]:.1f} | {medians[1]:.1f} | {middle:+.1f} % | {low:+.1f} to {high:+.1f} % |")


if __name__ == "__main__":
    main()
