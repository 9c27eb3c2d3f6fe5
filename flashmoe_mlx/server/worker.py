"""The thread that owns the engine: it begins sequences, runs the scheduler, and publishes events.

The thread never waits for a socket: it hands events to the event loop and goes on. Requests wait in order; a cancelled
request leaves the queue at once, and a running one ends at the next layer.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence as GeneratedSequence
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.server.answer import Answer
from flashmoe_mlx.server.errors import ApiError, as_api_error
from flashmoe_mlx.server.events import Event, Failed, Finished, Started, Usage
from flashmoe_mlx.server.reading import AnswerReader, PrefillReports, usage_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """The replacement of the engine.

    Attributes:
        load: loads the new engine.
        done: called in the thread of the engine with None, or with the error that kept the earlier engine.
    """

    load: Callable[[], Engine]
    done: Callable[[BaseException | None], object]


class Worker:
    """The thread of one engine at a time.

    Args:
        load: loads the engine; called in the thread.
        together: the largest number of answers in progress.
        on_begin: called in the thread with each answer that leaves the queue.
        on_end: called in the thread with each answer that has ended, before its last event is published.
        on_load: called in the thread with each engine.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        together: int,
        on_begin: Callable[[Answer], object] = lambda _: None,
        on_end: Callable[[Answer, Event], object] = lambda *_: None,
        on_load: Callable[[Engine], object] = lambda _: None,
    ) -> None:
        self._load = load
        self._together = together
        self._on_begin = on_begin
        self._on_end = on_end
        self._on_load = on_load
        self._change: Change | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._stopping = False
        self._active: dict[GeneratedSequence, tuple[Answer, AnswerReader]] = {}
        self.engine: Engine | None = None
        """The engine, once it is loaded."""
        self.failure: BaseException | None = None
        """The error that ended the thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start to load the engine."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Cancel all answers and close the engine; return whether that took less than ``seconds``."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        for answer, _ in list(self._active.values()):
            answer.cancel()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return sum(not answer.cancelled for answer in tuple(self._waiting))

    @property
    def running(self) -> int:
        """The number of answers in progress."""
        return len(self._active)

    def submit(self, answer: Answer) -> None:
        """Queue a request."""
        with self._changed:
            self._waiting.append(answer)
            self._changed.notify()

    def change(self, change: Change) -> bool:
        """Replace the engine when no answer is in progress; return False if another change is waiting."""
        with self._changed:
            if self._change is not None or self._stopping:
                return False
            self._change = change
            self._changed.notify()
            return True

    def fail(self, error: Exception) -> None:
        """Tell the clients of all answers about ``error``, from another thread, because the process is about to end."""
        for answer in [*self._waiting, *(answer for answer, _ in list(self._active.values()))]:
            self._end(answer, Failed(as_api_error(error)))

    def _run(self) -> None:
        try:
            engine = self.engine = self._load()
            self._on_load(engine)
            while True:
                with engine:
                    self._serve(engine)
                if self._stopping or self._change is None:
                    return
                self.engine = None
                engine = self._replacement(self._change)
        except BaseException as error:
            self.failure = error
            _log.exception("the engine's thread ended")
        finally:
            with self._changed:
                answers = [*self._waiting, *(answer for answer, _ in self._active.values())]
                self._waiting.clear()
                change, self._change = self._change, None
            if change is not None:
                change.done(self.failure or ApiError("the server stops", status=503, code="stopping", retry_after=5))
            for answer in answers:
                self._end(answer, Failed(as_api_error(self.failure or RuntimeError("the server stops"))))

    def _replacement(self, change: Change) -> Engine:
        """Return the engine that ``change`` loads, or else an engine as before."""
        try:
            engine, failure = change.load(), None
            self._load = change.load
        except Exception as error:
            failure = error
            engine = self._load()
        self.engine, self._change = engine, None
        self._on_load(engine)
        change.done(failure)
        return engine

    def _serve(self, engine: Engine) -> None:
        """Answer requests until the server stops, or until the engine is to be replaced."""
        scheduler = Scheduler(engine.runner, self._together)
        while True:
            with self._changed:
                while not self._waiting and not self.running and not self._stopping and self._change is None:
                    self._changed.wait()
                if self._change is not None and not self.running and not self._stopping:
                    return
                room = self._together - self.running if self._change is None else 0
                begun = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                if self._stopping and not begun and not self.running:
                    return
            for answer in begun:
                self._begin(engine, scheduler, answer)
            if self._active:
                scheduler = self._step(engine, scheduler)

    def _begin(self, engine: Engine, scheduler: Scheduler, answer: Answer) -> None:
        if answer.cancelled or self._stopping:
            self._end(answer, Finished("cancelled", Usage(len(answer.prepared.request.prompt_ids))))
            return

        def publish(events: Sequence[Event]) -> None:
            self._publish(answer, events)

        try:
            sequence = engine.runner.begin(answer.prepared.request, PrefillReports(publish))
            reader = AnswerReader(answer.prepared, sequence, engine.tokenizer, engine.model.config.max_context)
        except Exception as error:
            self._end(answer, Failed(as_api_error(error)))
            return
        answer.sequence = sequence
        sequence.cancelled |= answer.cancelled  # by the other thread, since the check above
        self._active[sequence] = answer, reader
        self._on_begin(answer)
        scheduler.add(sequence)
        self._publish(answer, [Started(usage_of(sequence))])

    def _step(self, engine: Engine, scheduler: Scheduler) -> Scheduler:
        """Advance all sequences; return the scheduler of the next step."""
        try:
            with engine.runner.exclusive():
                changed = scheduler.step()
        except NodeLostError:
            raise  # no later step can succeed
        except Exception as error:
            _log.exception("a step failed")
            for answer, _ in self._active.values():
                self._end(answer, Failed(as_api_error(error)))
            self._active.clear()
            return Scheduler(engine.runner, self._together)
        for change in changed:
            answer, reader = self._active[change.sequence]
            events: list[Event]
            try:
                if change.error is not None:
                    raise change.error
                events = reader.take()
            except Exception as error:
                change.sequence.cancel()
                events = [Failed(as_api_error(error))]
            if events and isinstance(events[-1], Finished | Failed):
                del self._active[change.sequence]
                self._publish(answer, events[:-1])
                self._end(answer, events[-1])
            else:
                self._publish(answer, events)
        return scheduler

    def _publish(self, answer: Answer, events: Sequence[Event]) -> None:
        if events and not answer.loop.is_closed():
            answer.post(events)

    def _end(self, answer: Answer, event: Event) -> None:
        try:
            self._on_end(answer, event)
        except Exception:
            _log.exception("an answer cannot be recorded")
        answer.sequence = None  # its listener refers to the answer: the garbage collector would keep both for long
        if isinstance(event, Finished) and event.reason == "cancelled":  # nobody waits, unless the server stops
            event = Failed(ApiError("the answer was cancelled", status=503, code="cancelled", retry_after=5))
        self._publish(answer, [event])
