"""The thread that owns the engine: it begins sequences, runs the scheduler, and publishes events.

The thread never waits for a socket: it hands events to the event loop and goes on. Requests wait in order; a cancelled
request leaves the queue at once, and a running one ends at the next layer.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence as GeneratedSequence
from flashmoe_mlx.server.answer import Answer
from flashmoe_mlx.server.errors import ApiError, as_api_error
from flashmoe_mlx.server.events import Event, Failed, Finished, Started, Usage
from flashmoe_mlx.server.reading import AnswerReader, PrefillReports, usage_of

_log = logging.getLogger(__name__)


class Worker:
    """The thread of one engine.

    Args:
        load: loads the engine; called in the thread.
        together: the largest number of answers in progress.
        on_end: called in the thread with each answer that has ended, before its last event is published.
    """

    def __init__(self, load: Callable[[], Engine], together: int, on_end: Callable[[Answer, Event], None]) -> None:
        self._load = load
        self._together = together
        self._on_end = on_end
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

    def _run(self) -> None:
        try:
            self.engine = self._load()
            with self.engine:
                self._serve(self.engine)
        except BaseException as error:
            self.failure = error
            _log.exception("the engine's thread ended")
        finally:
            with self._changed:
                answers = [*self._waiting, *(answer for answer, _ in self._active.values())]
                self._waiting.clear()
            for answer in answers:
                self._end(answer, Failed(as_api_error(self.failure or RuntimeError("the server stops"))))

    def _serve(self, engine: Engine) -> None:
        scheduler = Scheduler(engine.runner, self._together)
        while True:
            with self._changed:
                while not self._waiting and not self.running and not self._stopping:
                    self._changed.wait()
                room = self._together - self.running
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
        scheduler.add(sequence)
        self._publish(answer, [Started(usage_of(sequence))])

    def _step(self, engine: Engine, scheduler: Scheduler) -> Scheduler:
        """Advance all sequences; return the scheduler of the next step."""
        try:
            with engine.runner.exclusive():
                changed = scheduler.step()
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
            answer.loop.call_soon_threadsafe(answer.publish, events)

    def _end(self, answer: Answer, event: Event) -> None:
        try:
            self._on_end(answer, event)
        except Exception:
            _log.exception("an answer cannot be recorded")
        if isinstance(event, Finished) and event.reason == "cancelled":  # nobody waits, unless the server stops
            event = Failed(ApiError("the answer was cancelled", status=503, code="cancelled", retry_after=5))
        self._publish(answer, [event])
