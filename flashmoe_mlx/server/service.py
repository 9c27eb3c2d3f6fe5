"""The service behind all routes: one engine, its queue, and the preparation of requests."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.server.answer import Answer, Prepared
from flashmoe_mlx.server.conversation import Conversation
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.events import Event, Failed, Finished
from flashmoe_mlx.server.lengths import check_prompt_memory
from flashmoe_mlx.server.metrics import Metrics
from flashmoe_mlx.server.observatory import Observatory, backend_name
from flashmoe_mlx.server.preparing import prepare
from flashmoe_mlx.server.worker import Change, Worker

_log = logging.getLogger(__name__)
_PREPARATIONS = 8
"""The largest number of prompts that are rendered and tokenized at once."""
_LONGEST_PREPARATION = 60.0
_KEPT_UNANSWERED = 3.0
"""Seconds for which an answer is kept after its client has gone, if the client is likely to repeat the request."""
_WORTH_KEEPING = 5.0
"""Seconds of work after which an answer is kept for any client."""
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of a service.

    Attributes:
        name: the name of the model for clients.
        aliases: further names.
        any_model: whether requests for other names are answered, too.
        queue: the largest number of requests that wait.
        together: the largest number of answers in progress.
        reload: loads the model with another backend or K, None for the present one; None if clients must not change it.
        record: receives the measurements of every answer.
    """

    name: str
    aliases: tuple[str, ...] = ()
    any_model: bool = True
    queue: int = 64
    together: int = 8
    reload: Callable[[str | None, int | None], Engine] | None = None
    record: Callable[[dict[str, Any]], object] = field(default=lambda _: None)


class Service:
    """A model that answers requests.

    Args:
        load: loads the engine, in the thread that owns it.
        settings: the settings.
    """

    def __init__(self, load: Callable[[], Engine], settings: Settings) -> None:
        self.settings = settings
        self.metrics: Metrics = Metrics()
        self.started: int = int(time.time())
        self.stopping = False
        self.observatory: Observatory = Observatory()
        self.worker: Worker = Worker(load, settings.together, self._began, self._record, self._loaded)
        self._preparing = asyncio.Semaphore(_PREPARATIONS)
        self._repeatable: dict[str, Answer] = {}
        """Answers in progress by the digest of their request."""

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: it is not loaded yet, or the server stops; status 503.
        """
        if self.stopping:
            raise ApiError("the server is stopping", status=503, code="stopping", retry_after=5)
        if self.worker.failure is not None or (self.worker.engine is not None and not self.worker.alive):
            raise ApiError(
                "the engine has failed; the log of the server has the details", status=503, code="engine_failed"
            )
        if self.worker.engine is None:
            raise ApiError("the model is loading", status=503, code="loading", retry_after=5)
        return self.worker.engine

    def check_model(self, name: str) -> None:
        """Refuse a name that is not served. Names are never paths: nothing is loaded for a request.

        Raises:
            ApiError: status 404.
        """
        if not self.settings.any_model and name not in (self.settings.name, *self.settings.aliases):
            raise ApiError(
                f"the model {name[:80]!r} is not served here; GET /v1/models lists the served names",
                status=404,
                code="model_not_found",
                param="model",
            )

    async def prepare(self, conversation: Conversation) -> Prepared:
        """Render and tokenize ``conversation``, and check its options, outside the event loop.

        Raises:
            ApiError: the template refuses the messages, an option is wrong, or the prompt exceeds the context.
        """
        engine = self.engine

        def make() -> Prepared:
            prepared = prepare(conversation, engine)
            check_prompt_memory(len(prepared.request.prompt_ids), engine)
            return prepared

        return await self.outside(make)

    async def outside(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread that can be abandoned, since templates of models have no limit of their time.

        Raises:
            ApiError: it takes too long; status 503. Errors of ``work`` are raised as they are.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not done.done():
                if error is None:
                    done.set_result(result)  # type: ignore[arg-type]
                else:
                    done.set_exception(error)

        def run() -> None:
            try:
                result, error = work(), None
            except BaseException as raised:
                result, error = None, raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        try:
            async with asyncio.timeout(_LONGEST_PREPARATION), self._preparing:
                threading.Thread(target=run, name="prepare", daemon=True).start()
                return await done
        except TimeoutError:
            raise ApiError("the prompt takes too long to prepare", status=503, code="prompt_too_slow") from None

    async def change_engine(self, backend: str | None, experts_k: int | None) -> None:
        """Load the model with another backend or number of experts, once the answers in progress have ended.

        Args:
            backend: the name of a backend; None for the present one.
            experts_k: the experts per token; None for the present number.

        Raises:
            ApiError: the server allows no changes (status 403), or another change is in progress (409).
            InputError: the model cannot be loaded so; the earlier engine is loaded again.
        """
        reload = self.settings.reload
        if reload is None:
            raise ApiError(
                "this server does not let clients change its engine; start it with server.switch=true",
                status=403,
                code="no_switch",
            )
        _ = self.engine
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: BaseException | None) -> None:
            if not done.done():
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

        def changed(error: BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, error)

        if not self.worker.change(Change(lambda: reload(backend, experts_k), changed)):
            raise ApiError("another change is in progress", status=409, code="change_in_progress", retry_after=5)
        await done

    def submit(self, prepared: Prepared, secret: str = "") -> Answer:
        """Queue a request; a watcher with the same ``secret`` sees the texts of its tokens.

        Raises:
            ApiError: the queue is full; status 429.
        """
        engine = self.engine
        assert engine is not None
        if self.worker.waiting >= self.settings.queue:
            self.metrics.refused += 1
            raise ApiError(f"{self.settings.queue} requests wait already", status=429, code="queue_full", retry_after=5)
        answer = Answer(prepared, asyncio.get_running_loop(), secret)
        self.worker.submit(answer)
        return answer

    def repeated(self, digest: str, *, announced: bool) -> Answer | None:
        """Return the answer in progress to the same request, if its client has gone or says that it repeats itself.

        Args:
            digest: the result of ``digest_of``.
            announced: whether the client says so.
        """
        answer = self._repeatable.get(digest)
        if answer is None or answer.cancelled or (answer.readers and not announced):
            return None
        if isinstance(answer.events[-1] if answer.events else None, Failed):
            return None
        answer.takeovers += 1
        self.metrics.taken_over += 1
        answer.wake()
        return answer

    def keep(self, digest: str, answer: Answer) -> None:
        """Let a repeated request take ``answer`` over while it is in progress."""
        self._repeatable[digest] = answer

    def forget(self, digest: str, answer: Answer) -> None:
        """End ``keep``."""
        if self._repeatable.get(digest) is answer:
            del self._repeatable[digest]

    def leave(self, digest: str, answer: Answer, *, delivered: bool, repeats: bool) -> None:
        """Note that a client has gone: cancel its answer, unless the client is likely to send the request again.

        Args:
            digest: the result of ``digest_of``.
            answer: the answer, which has no other readers.
            delivered: whether the client received a part of the answer; no client repeats such a request.
            repeats: whether the client is one that repeats requests after a timeout.
        """
        worked = time.monotonic() - answer.created
        if not delivered and not answer.complete and (repeats or worked > _WORTH_KEEPING):
            asyncio.get_running_loop().call_later(_KEPT_UNANSWERED, self._give_up, digest, answer)
        else:
            self._give_up(digest, answer)

    def _give_up(self, digest: str, answer: Answer) -> None:
        if not answer.readers:
            self.forget(digest, answer)
            if not answer.complete:
                answer.cancel()

    def _loaded(self, engine: Engine) -> None:
        """Note a new engine; called in the engine's thread."""
        self.metrics.backend = backend_name(engine.setup["backend"])
        self.observatory.attach(engine)

    def _began(self, answer: Answer) -> None:
        """Note an answer that leaves the queue; called in the engine's thread."""
        self.metrics.began(time.monotonic() - answer.created)
        if answer.sequence is not None:
            self.observatory.began(answer.sequence, answer.secret)

    def _record(self, answer: Answer, event: Event) -> None:
        """Record the end of an answer; called in the engine's thread."""
        seconds = time.monotonic() - answer.created
        usage = event.usage if isinstance(event, Finished) else None
        sequence = answer.sequence
        first = None if sequence is None else sequence.metrics.time_to_first_token
        reason = event.reason if isinstance(event, Finished) else "error"
        self.metrics.ended(reason, seconds, first, usage)
        record = {
            "time": time.time(),
            "finish_reason": reason,
            "error": event.error.code if isinstance(event, Failed) else None,
            "seconds": seconds,
            "time_to_first_token": first,
            "prompt_tokens": len(answer.prepared.request.prompt_ids),
            "cached_tokens": usage.cached if usage else 0,
            "completion_tokens": usage.completion if usage else 0,
            "reasoning_tokens": usage.reasoning if usage else 0,
        }
        engine = self.worker.engine
        if sequence is not None and engine is not None:
            model, store = engine.model, engine.store
            measured = sequence.metrics.to_json(model.touched_bytes, store.layout.mean_record_bytes)
            record |= {"prefill": measured["prefill"], "decode": measured["decode"], "sampling": measured["sampling"]}
        self.settings.record(record)


def digest_of(path: str, body: bytes) -> str:
    """Return a digest that equal requests share."""
    return hashlib.sha256(path.encode() + b"\n" + body).hexdigest()
