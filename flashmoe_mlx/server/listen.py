"""The HTTP server: the socket, and the orderly end."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.server.app import make_app
from flashmoe_mlx.server.connection import Connection, most_connections
from flashmoe_mlx.server.middleware import Policy
from flashmoe_mlx.server.service import Service
from flashmoe_mlx.stores.libc import limit_heaps, release_free_memory

_HEAPS = 2
"""Heaps of the C library. Every request has a thread for its preparation, and by default each thread adds a heap."""
_BETWEEN_RELEASES = 30.0
"""Seconds after which free memory is returned to the system."""


def check_exposure(host: str, *, has_key: bool, insecure: bool) -> None:
    """Refuse to serve other machines without an API key.

    Raises:
        InputError: code "exposed_server".
    """
    if not (is_local(host) or has_key or insecure):
        raise InputError(
            f"server.host={host}: other machines could use this server; set server.api_key_file, or "
            "server.insecure=true on a network that you trust",
            code="exposed_server",
        )


def is_local(host: str) -> bool:
    """Return whether only this machine can reach a server at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: the address is wrong or in use; code "cannot_listen".
    """
    try:
        if not 0 <= port <= 65_535:  # the system takes the remainder
            raise OSError("a port is a number from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(most_connections())
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"server.host={host} server.port={port}: cannot listen there ({error.strerror or error}); choose another "
            "server.port, 0 for any free one",
            code="cannot_listen",
        ) from None
    return listener


class HttpServer:
    """A server for one service.

    Args:
        service: the service; its engine is loaded after the socket listens.
        policy: the accepted requests.
        stop_seconds: the time that answers in progress have to finish when the server stops.
    """

    def __init__(self, service: Service, policy: Policy, stop_seconds: float = 10.0) -> None:
        self._service = service
        self._stop_seconds = stop_seconds
        config = uvicorn.Config(
            make_app(service, policy),
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=max(1, int(stop_seconds)),
        )
        self._server = _Uvicorn(config, self._on_exit)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    def run(self, listener: socket.socket, on_ready: Callable[[], object] = lambda: None) -> None:
        """Serve until a signal comes or ``stop`` is called.

        Args:
            listener: a listening socket.
            on_ready: called once the model is loaded.

        Raises:
            FlashMoeError: the model cannot be loaded.
        """
        asyncio.run(self._run(listener, on_ready))
        failure = self._service.worker.failure
        if isinstance(failure, Exception):
            raise failure

    def stop(self) -> None:
        """Stop from another thread."""
        self._service.stopping = True
        self._server.should_exit = True

    def _on_exit(self) -> None:
        self._service.stopping = True

    async def _run(self, listener: socket.socket, on_ready: Callable[[], object]) -> None:
        worker = self._service.worker
        limit_heaps(_HEAPS)
        worker.start()
        watching = asyncio.create_task(self._watch(on_ready))
        try:
            await self._server.serve(sockets=[listener])
        finally:
            self._service.stopping = True
            watching.cancel()
            stopped = await asyncio.to_thread(worker.stop, max(1.0, self._stop_seconds))
            if not stopped:
                raise FlashMoeError(
                    f"the engine did not stop within {self._stop_seconds:g} seconds", code="stop_timeout"
                )

    async def _watch(self, on_ready: Callable[[], object]) -> None:
        """Report the loaded model; release free memory from time to time; stop if the engine's thread ends."""
        worker, loop = self._service.worker, asyncio.get_running_loop()
        ready, next_release = False, loop.time() + _BETWEEN_RELEASES
        while worker.alive:
            if not ready and worker.engine is not None:
                ready = True
                on_ready()
            if loop.time() >= next_release:
                next_release = loop.time() + _BETWEEN_RELEASES
                await asyncio.to_thread(release_free_memory)
            await asyncio.sleep(0.05 if not ready else 0.5)
        self.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which tells when it begins to stop, and leaves signals alone outside the main thread."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal; a second interrupt ends answers at once."""
        self._on_exit()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; do not raise them again afterwards."""
        handled: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # outside the main thread
            handled = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)
