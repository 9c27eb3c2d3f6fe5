"""The observatory: passes of the engine as a stream of frames, for everyone who watches.

Without a watcher the engine reports nothing. With watchers, the engine's thread puts each pass into a list, and the
event loop makes one frame of the list, at most five times a second. The engine never waits for a watcher, and a watcher
who falls behind is dropped.

The text of a token goes only to the watcher whose own request it answers: both carry the same random secret.
"""

import asyncio
import hmac
import json
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.pass_meter import WatchedPass
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.observed import Shape, Token, frame

SECRET = "x-flashmoe-watcher"  # noqa: S105  # the name of a header
"""The header with the secret that a watcher shares with its own requests."""
SHORTEST_SECRET = 16
INTERVAL = 0.2
"""Seconds between two frames."""
_MOST_WATCHERS = 8
_MOST_FRAMES = 50
"""Frames that may wait for a watcher before it is dropped."""
_MOST_PASSES = 4096
"""Passes that wait for a frame; beyond, the oldest are left out."""
_LONGEST_TEXT = 64
_NAMED_OPTIONS = ("variant", "policy", "reader", "advice")
"""Options of stores whose values are words."""
_PATIENCE = 1.0
"""Seconds after which a waiting stream looks whether the server stops."""


class Watch:
    """The frames that wait for one watcher; ``secret`` is empty if it has none."""

    def __init__(self, secret: str) -> None:
        self.secret = secret
        self.frames: deque[bytes] = deque()
        self.dropped: bool = False
        self.arrived: asyncio.Event = asyncio.Event()

    def put(self, content: bytes) -> None:
        """Add a frame, or drop the watcher if too many wait."""
        if len(self.frames) >= _MOST_FRAMES:
            self.dropped = True
            self.frames.clear()
        elif not self.dropped:
            self.frames.append(content)
        self.arrived.set()


class Observatory:
    """All watchers of one server.

    All methods but ``began`` and ``attach`` are called in the thread of the event loop.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._shape = Shape(1, 1, 1)
        self._watches: set[Watch] = set()
        self._passes: deque[WatchedPass] = deque(maxlen=_MOST_PASSES)
        self._received = 0
        self._scheduled = False
        self._latest_frame = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: WeakKeyDictionary[Sequence, tuple[int, str]] = WeakKeyDictionary()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def watchers(self) -> int:
        """The number of watchers."""
        return len(self._watches)

    def began(self, sequence: Sequence, secret: str) -> None:
        """Note a new answer, and the secret of its request."""
        with self._lock:
            self._count += 1
            self._answers[sequence] = self._count, secret

    def attach(self, engine: Engine) -> None:
        """Observe ``engine`` from now on, in place of an earlier one."""
        with self._lock:
            self._engine = engine
            self._shape = _shape(engine)
            self._passes.clear()
            self._received = 0
            if self._watches and self._loop is not None:
                engine.watch(self._receive)
                self._loop.call_soon_threadsafe(self._announce, engine)

    def _announce(self, engine: Engine) -> None:
        content = _json(describe(engine))
        for watch in self._watches:
            watch.put(content)

    def refuse_crowd(self) -> None:
        """Refuse one watcher too many.

        Raises:
            ApiError: status 429.
        """
        if len(self._watches) >= _MOST_WATCHERS:
            raise ApiError(
                f"{_MOST_WATCHERS} watchers are connected already; close one of their pages",
                status=429,
                code="too_many_watchers",
                retry_after=5,
            )

    async def frames(self, secret: str) -> AsyncGenerator[bytes | None]:
        """Yield frames for a watcher as they come, and None after each second without one.

        Ends if the watcher falls behind.
        """
        watch = self._join(secret)
        try:
            while not watch.dropped:
                watch.arrived.clear()
                while watch.frames:
                    yield watch.frames.popleft()
                try:
                    async with asyncio.timeout(_PATIENCE):
                        await watch.arrived.wait()
                except TimeoutError:
                    yield None
        finally:
            self._leave(watch)

    def _join(self, secret: str) -> Watch:
        watch = Watch(secret)
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._watches.add(watch)
            if self._engine is not None:
                self._engine.watch(self._receive)
        return watch

    def _leave(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)
            if not self._watches:
                if self._engine is not None:
                    self._engine.watch(None)
                self._passes.clear()
                self._received = 0

    def _receive(self, watched: WatchedPass) -> None:
        """Take a pass, in the engine's thread."""
        with self._lock:
            self._passes.append(watched)
            self._received += 1
        loop = self._loop
        if not self._scheduled and loop is not None:
            self._scheduled = True
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._schedule, loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_at(max(loop.time(), self._latest_frame + INTERVAL), self._send, loop)

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make a frame of the passes since the last one."""
        self._latest_frame = loop.time()
        self._scheduled = False
        with self._lock:
            passes, engine = list(self._passes), self._engine
            lost, self._received = self._received - len(passes), 0
            self._passes.clear()
        if not passes or engine is None:
            return
        content, tokens = frame(passes, self._shape)
        content |= {"type": "frame", "lost": lost, "totals": asdict(engine.store.stats())}
        content["answers"] = [self._answer(sequence)[0] for sequence, _ in tokens]
        head = _json(content)[:-1]
        for watch in self._watches:
            texts = _json([self._text(engine, token, watch.secret) for token in tokens])
            watch.put(head + b',"texts":' + texts + b"}")

    def _answer(self, sequence: Sequence) -> tuple[int, str]:
        with self._lock:
            return self._answers.get(sequence, (0, ""))

    def _text(self, engine: Engine, token: Token, secret: str) -> str | None:
        """Return the text of a token if the watcher with ``secret`` has asked for it."""
        sequence, position = token
        own = self._answer(sequence)[1]
        if len(own) < SHORTEST_SECRET or not hmac.compare_digest(own.encode(), secret.encode()):
            return None
        prompt = sequence.request.prompt_ids
        token_id = prompt[position] if position < len(prompt) else sequence.token_ids[position - len(prompt)]
        return engine.tokenizer.decode([token_id])[:_LONGEST_TEXT]


def _shape(engine: Engine) -> Shape:
    source = engine.store.source
    return Shape(source.num_layers, source.num_experts, engine.setup["experts_k"])


def backend_name(settings: Mapping[str, Any]) -> str:
    """Return the name of a backend for people, given its settings."""
    return str(settings.get("_target_", "")).split(".")[-2:][0]


def describe(engine: Engine) -> dict[str, Any]:
    """Return the model, its store and the store's counters, for JSON. Paths of this machine are left out."""
    shape, config = _shape(engine), engine.model.config
    settings = engine.setup["backend"]
    options = {
        name: value
        for name, value in settings.items()
        if value is None or isinstance(value, int | float) or name in _NAMED_OPTIONS
    }
    return {
        "type": "state",
        "layers": shape.layers,
        "num_experts": shape.num_experts,
        "experts_k": shape.experts_k,
        "own_experts_k": config.experts_per_token,
        "record_bytes": engine.store.layout.record_bytes,
        "backend": backend_name(settings),
        "options": options,
        "totals": asdict(engine.store.stats()),
    }


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
