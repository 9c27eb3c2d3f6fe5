"""A server in a thread of the tests, and the client that asks it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from flashmoe_mlx.engine import load
from flashmoe_mlx.server.listen import HttpServer, listening_socket
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service, Settings

CHAT = "/v1/chat/completions"
SUM = {"role": "user", "content": "What is 17 plus 25?"}


@dataclass
class Live:
    """A running server."""

    url: str
    server: HttpServer
    service: Service
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def client(self) -> httpx2.Client:
        """A client of this server."""
        return self._client

    def __post_init__(self) -> None:
        self._client = httpx2.Client(base_url=self.url, timeout=60)

    def connect(self, wait: float = 5.0) -> socket.socket:
        """Return a new connection, whose operations take at most ``wait`` seconds."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=wait)

    def connections(self) -> list[Any]:
        """Return the server's end of all connections."""
        return list(self.server._server.server_state.connections)

    def held(self) -> int:
        """Return the bytes of the bodies of the requests in progress."""
        guard: Any = self.server._server.config.app
        held: int = guard._bodies
        return held

    def post(self, path: str = CHAT, *, status: int = 200, headers: Any = None, **fields: Any) -> dict[str, Any]:
        """Send ``fields`` and return the body of the answer, which has ``status``."""
        answer = self._client.post(path, json=fields, headers=headers)
        assert answer.status_code == status, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def chat(self, *messages: dict[str, Any], status: int = 200, **fields: Any) -> dict[str, Any]:
        """Ask for an answer to ``messages``, greedily."""
        body = {"model": "demo", "messages": list(messages or (SUM,)), "temperature": 0, **fields}
        return self.post(status=status, **body)

    def stream(self, path: str = CHAT, **fields: Any) -> list[Any]:
        """Return the data of all events of a streamed answer."""
        return [data for _, data in self.named_events(path, **fields)]

    def named_events(self, path: str = CHAT, **fields: Any) -> list[tuple[str | None, Any]]:
        """Return names and data of all events of a streamed answer."""
        body = {"model": "demo", "temperature": 0, "stream": True, **fields}
        with self._client.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            return list(parse_events(answer.iter_lines()))

    def wait_idle(self, seconds: float = 10.0) -> float:
        """Wait until the engine has nothing to do; return the seconds that took."""
        start = time.monotonic()
        while self.service.worker.running or self.service.worker.waiting:
            assert time.monotonic() - start < seconds, "the engine is still busy"
            time.sleep(0.005)
        return time.monotonic() - start


def raw(live: Live, *lines: str, body: bytes = b"", wait: float = 5.0) -> bytes:
    """Send a request as bytes; return the answer until the server closes or has answered."""
    with live.connect(wait) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
                if b"\r\n\r\n" in received and b'"error"' in received:
                    break
        except (TimeoutError, ConnectionResetError):  # the server closes without reading the rest
            pass
        return received


def parse_events(lines: Iterator[str]) -> Iterator[tuple[str | None, Any]]:
    """Yield the name and the data of each server-sent event."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield name, data if data == "[DONE]" else json.loads(data)
            name = None


@contextmanager
def serve(pack: Path, policy: Policy | None = None, engine_options: Any = None, **settings: Any) -> Iterator[Live]:
    """Serve the model in ``pack`` until the block ends."""
    listener = listening_socket("127.0.0.1", 0)
    records: list[dict[str, Any]] = []
    chosen = Settings("demo", ("other",), record=records.append, **settings)
    service = Service(lambda: load(pack, **(engine_options or {})), chosen)
    server = HttpServer(service, policy or Policy(), stop_seconds=5)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(listener, ready.set), daemon=True)
    thread.start()
    assert ready.wait(60)
    live = Live(f"http://127.0.0.1:{listener.getsockname()[1]}", server, service, records)
    try:
        yield live
    finally:
        live.client.close()
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
