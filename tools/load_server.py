"""Load a server: many clients at once, half of them hostile, and look for crashes, leaks and unanswered requests.

    python tools/load_server.py [--clients 50] [--requests 1000] [--seed 0]

Each client picks well-formed requests (answered or told to come back later) or hostile ones: a client that leaves, that
reads slowly or not at all, malformed bodies and HTTP, absurd values, schemas that explode. The server is a process of
its own with the demo model, measured from outside: resident memory, descriptors, threads. It prints one JSON object;
the exit code is 1 if a well-formed request had no answer, or anything leaked.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil

_SUM = {"role": "user", "content": "What is 17 plus 25?"}
_ANSWER = "17 plus 25 is 42."
_CHAT, _MESSAGES, _RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
_HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
_LEAKED_MIB = 100
"""Growth of resident memory between the middle and the end of a run that counts as a leak."""


def _text_of(path: str, body: dict[str, Any]) -> str:
    if path == _CHAT:
        return str(body["choices"][0]["message"]["content"])
    blocks = body["content"] if path == _MESSAGES else body["output"][-1]["content"]
    return str(blocks[-1]["text"])


async def well_formed(client: httpx2.AsyncClient, draw: random.Random) -> str:
    """Ask for the sum by a random API, streamed or not; repeat while the queue is full. Return the outcome."""
    path = draw.choice([_CHAT, _MESSAGES, _RESPONSES])
    question = {"input": [_SUM]} if path == _RESPONSES else {"messages": [_SUM]}
    limit = {"max_tokens": 40} if path == _MESSAGES else {}
    body = {"model": "demo", "temperature": 0, **question, **limit, "stream": draw.random() < 0.5}
    for _ in range(100):
        answer = await client.post(path, json=body)
        if answer.status_code in (429, 503) and "retry-after" in answer.headers:
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            continue
        if answer.status_code != 200:
            return f"status {answer.status_code}"
        if body["stream"]:
            joined = "".join(_deltas(answer.text))
            return "answered" if _ANSWER in joined else f"wrong stream {joined[:60]!r}"
        text = _text_of(path, answer.json())
        return "answered" if text == _ANSWER else f"wrong text {text[:60]!r}"
    return "refused 100 times"


def _deltas(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line.removeprefix("data: "))
            delta = data.get("delta") or (data["choices"][0]["delta"] if data.get("choices") else "")
            found.append(delta if isinstance(delta, str) else delta.get("content") or delta.get("text") or "")
    return found


async def hostile(client: httpx2.AsyncClient, draw: random.Random, port: int) -> str:
    """Do something hostile; return its name."""
    kind = draw.choice(["leave", "leave whole", "slow", "unread", "malformed", "raw", "absurd", "bomb", "long", "drip"])
    long = {"model": "demo", "messages": [_SUM], "temperature": 2, "max_tokens": 400, "stream": kind != "leave whole"}
    body = json.dumps({**long, "logit_bias": {"2041": -100, "2039": -100}}).encode()
    request = f"POST {_CHAT} HTTP/1.1\r\n{_HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if kind in ("malformed", "absurd", "bomb", "long"):
        await client.post(_CHAT, content=_bad_body(kind, draw), headers={"content-type": "application/json"})
        return kind
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if kind == "raw":
            writer.write(draw.randbytes(draw.randint(1, 3000)) + b"\r\n\r\n")
        elif kind == "drip":
            writer.write(request[: draw.randint(1, len(request) - 1)])
        else:
            writer.write(request)
        await writer.drain()
        if kind in ("leave", "leave whole", "drip", "unread"):
            await asyncio.sleep(draw.uniform(0, 1.0))
        else:
            for _ in range(20 if kind == "slow" else 1):
                async with asyncio.timeout(5):
                    if not await reader.read(64):
                        break
                await asyncio.sleep(0.05 if kind == "slow" else 0)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return kind


def _bad_body(kind: str, draw: random.Random) -> bytes:
    if kind == "malformed":
        return draw.choice(
            [b"", b"{", b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe", b'{"model": 1, "model": 2}', b"null"]
        )
    if kind == "long":
        content = draw.choice(["apple ", "a", "<|im_end|>", " \n"]) * 300_000
        return json.dumps({"model": "demo", "messages": [{"role": "user", "content": content}]}).encode()
    extra: dict[str, Any] = draw.choice(
        [{"n": 10**6}, {"temperature": 1e300}, {"max_tokens": -1}, {"tools": [{}] * 1000}, {"stop": ["x"] * 1000}]
    )
    if kind == "bomb":
        parts = {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(40)}
        schema = {"$defs": {**parts, "40": {"type": "string"}}, "$ref": "#/$defs/0"}
        asked = draw.choice([schema, {"type": "string", "pattern": "^(a+)+$"}, {"enum": ["x" * 70_000]}, {"$ref": "#"}])
        extra = {"response_format": {"type": "json_schema", "json_schema": {"schema": asked}}, "max_tokens": 2}
    return json.dumps({"model": "demo", "messages": [_SUM], **extra}).encode()


def _usage(process: psutil.Process) -> dict[str, int]:
    rss = process.memory_info().rss >> 20
    return {"rss_mib": rss, "descriptors": process.num_fds(), "threads": process.num_threads()}


async def load(port: int, process: psutil.Process, clients: int, requests: int, seed: int) -> dict[str, Any]:
    """Send ``requests`` requests from ``clients`` clients; return the outcomes and the resources of the server."""
    base = f"http://127.0.0.1:{port}"
    outcomes: Counter[str] = Counter()
    attacks: Counter[str] = Counter()
    left = iter(range(requests))
    usage = []
    start = time.monotonic()
    async with httpx2.AsyncClient(base_url=base, timeout=300, limits=httpx2.Limits(max_connections=None)) as client:
        await well_formed(client, random.Random(0))  # noqa: S311  # a load, not a secret
        usage.append(_usage(process))

        async def one(number: int) -> None:
            draw = random.Random(seed * 1000 + number)  # noqa: S311
            for index in left:
                if index == requests // 2:
                    usage.append(_usage(process))
                if number % 2:
                    attacks[await hostile(client, draw, port)] += 1
                else:
                    outcomes[await well_formed(client, draw)] += 1

        await asyncio.gather(*map(one, range(clients)))
        seconds = time.monotonic() - start
    async with httpx2.AsyncClient(base_url=base, timeout=60) as client:
        for _ in range(200):
            metrics = (await client.get("/metrics")).text
            if 'flashmoe_requests_running{backend="pread"} 0' in metrics:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        last = await well_formed(client, random.Random(0))  # noqa: S311
    usage.append(_usage(process))
    begin, middle, end = usage
    leaks = [name for name in ("descriptors", "threads") if end[name] > begin[name] + 5]
    if end["rss_mib"] > middle["rss_mib"] + _LEAKED_MIB:
        leaks.append("rss_mib")
    unanswered = {outcome: count for outcome, count in outcomes.items() if outcome != "answered"}
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "well_formed": dict(outcomes),
        "hostile": dict(sorted(attacks.items())),
        "answered_afterwards": last == "answered",
        "usage": {"begin": begin, "middle": middle, "end": end},
        "leaks": leaks,
        "passed": not unanswered and not leaks and last == "answered" and process.is_running(),
    }


def serve_and_load(clients: int, requests: int, seed: int) -> dict[str, Any]:
    """Load a server with the demo model, which is a process; return the result of ``load`` and of the process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "flashmoe_mlx",
            "task=serve",
            "server.port=0",
            "prompt_cache_gib=0.05",
            f"hydra.run.dir={folder}",
        ]
        log = Path(folder) / "output.txt"
        with log.open("wb") as output, subprocess.Popen(command, stderr=output, stdout=output) as server:  # noqa: S603
            try:
                while "ready:" not in log.read_text():
                    if server.poll() is not None:
                        raise SystemExit(log.read_text())
                    time.sleep(0.1)
                port = int(log.read_text().partition("listening on http://127.0.0.1:")[2].split()[0])
                process = psutil.Process(server.pid)
                result = asyncio.run(load(port, process, clients, requests, seed))
            finally:
                server.terminate()
            result["exit_code"] = server.wait(60)
            result["traceback"] = "Traceback" in log.read_text()
    result["passed"] &= result["exit_code"] == 0 and not result["traceback"]
    return result


def main() -> None:
    """Print the result of ``serve_and_load``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = serve_and_load(arguments.clients, arguments.requests, arguments.seed)
    print(json.dumps(result, indent=1))
    raise SystemExit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
