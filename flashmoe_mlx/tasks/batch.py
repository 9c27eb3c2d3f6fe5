"""``task=batch``: answer a file of requests, several at once, and continue an interrupted run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flashmoe_mlx.console.output import console, counted, show
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.generation.batch_file import AnswerFile, Line, read_batch
from flashmoe_mlx.generation.concurrency import Concurrency, run_all
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.batch_answers import BatchAnswer, begin_answer
from flashmoe_mlx.tasks.shared.keys import TEXT, PromptCacheConfig
from flashmoe_mlx.tasks.shared.loading import load_engine
from flashmoe_mlx.tasks.shared.model import model_identity

_log = logging.getLogger(__name__)


@dataclass
class Config(PromptCacheConfig):
    """Keys of ``task=batch``."""

    input: str | None = field(default=None, metadata=TEXT)
    out: str | None = field(default=None, metadata=TEXT)
    together: int | None = None
    raw: bool = False
    max_tokens: int = 256
    system: str | None = field(default=None, metadata=TEXT)
    thinking: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    prefill_chunk: int | None = None


def run(config: Config, run_dir: Path) -> None:
    """Answer the requests in ``input``, append the answers to ``out``, and write ``batch.json`` to ``run_dir``."""
    if config.input is None or config.out is None:
        raise InputError("task=batch needs input=<file of requests> and out=<file for the answers>")
    lines = read_batch(Path("/dev/stdin") if config.input == "-" else expand_path(config.input))
    out = expand_path(config.out)
    with closing(AnswerFile(out)) as answers:
        waiting = [line for line in lines if line.key not in answers.done]
        if unknown := answers.done - {line.key for line in lines}:
            raise InputError(
                f"{out}: holds an answer to {min(unknown)!r}, which is not in {config.input}; choose another out=",
                code="invalid_batch",
            )
        if len(waiting) < len(lines):
            show(f"{counted(len(lines) - len(waiting), 'answer')} of an earlier run kept")
        if not waiting:
            show(f"answers: {out}")
            return
        loaded, folder = load_engine(config)
        with loaded as engine:
            defaults = _defaults(config)
            engine.request("a", **defaults)  # refuses options that would make every request fail
            batch = _Batch(engine, config.together, defaults, model_identity(folder))
            with _progress(len(lines), len(lines) - len(waiting)) as advance:
                try:
                    for answer in batch.answers(waiting):
                        answers.write(answer)
                        advance()
                finally:
                    write_json(run_dir / "batch.json", batch.record() | {"environment": environment()})
            show(batch.summary())
    show(f"answers: {out}\nrecord: {run_dir}")
    if batch.failed:
        raise FlashMoeError(
            f"{counted(batch.failed, 'request')} of {len(waiting)} failed; the lines of their answers hold the errors",
            code="batch_failed",
        )


def _defaults(config: Config) -> RequestOptions:
    """Return the options of requests that do not set them."""
    return {
        "raw": config.raw,
        "max_tokens": config.max_tokens,
        "system": config.system,
        "enable_thinking": config.thinking,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "seed": config.seed,
        "prefill_chunk": config.prefill_chunk,
    }


class _Batch:
    """The answers to the requests of a file.

    Args:
        engine: the loaded model.
        together: the number of requests that are answered at once; None to choose it.
        defaults: options of requests that do not set them.
        model: the name of the model.
    """

    def __init__(self, engine: Engine, together: int | None, defaults: RequestOptions, model: str) -> None:
        self._engine = engine
        self._model = model
        self._concurrency = Concurrency(engine.runner, together)
        self._defaults = defaults
        self.answered = self.failed = self._prompt_tokens = self._tokens = 0
        self._seconds = 0.0
        self._active: dict[Sequence, tuple[Line, BatchAnswer, int]] = {}
        self._left: dict[str, int] = {}
        """The number of sequences in progress or waiting for each key."""
        self._failures: list[Mapping[str, Any]] = []

    def answers(self, lines: list[Line]) -> Iterator[Mapping[str, Any]]:
        """Yield the line of each answer when it is complete."""
        start = perf_counter()
        try:
            for change in run_all(self._engine.runner, self._sequences(lines), self._concurrency):
                yield from self._take_failures()
                line, answer, index = self._active[change.sequence]
                if change.error is not None:
                    del self._active[change.sequence]
                    if line.key in self._left:
                        self._fail(line, change.error)
                    continue
                answer.take(index)  # which may end the sequence
                if change.sequence.finish_reason is None:
                    continue
                del self._active[change.sequence]
                self._tokens += len(change.sequence.token_ids)
                if line.key not in self._left:  # another choice of the same line failed
                    continue
                self._left[line.key] -= 1
                if not self._left[line.key]:
                    del self._left[line.key]
                    self.answered += 1
                    self._prompt_tokens += len(change.sequence.request.prompt_ids)
                    yield answer.line()
            yield from self._take_failures()
        finally:
            self._seconds = perf_counter() - start

    def _sequences(self, lines: list[Line]) -> Iterator[Sequence]:
        """Yield the sequences of ``lines``, which are tokenized only now: a file may hold millions."""
        for line in lines:
            try:
                answer = begin_answer(line, self._engine, self._defaults, self._model)
                sequences = [self._engine.runner.begin(request) for request in answer.requests]
            except Exception as error:  # one line cannot end the run
                self._fail(line, error)
                continue
            self._left[line.key] = len(sequences)
            for index, sequence in enumerate(sequences):
                answer.begin(index, sequence)
                self._active[sequence] = line, answer, index
                yield sequence

    def _fail(self, line: Line, error: Exception) -> None:
        _log.warning("request %r: %s", line.key, error)
        self._left.pop(line.key, None)
        self.failed += 1
        self._failures.append(line.failure(error))

    def _take_failures(self) -> list[Mapping[str, Any]]:
        taken, self._failures = self._failures, []
        return taken

    def record(self) -> dict[str, Any]:
        """Return the measurements in the form of ``batch.json``; seconds include prompts and answers."""
        return {
            **self._engine.setup,
            "together": self._concurrency.most,
            "answered": self.answered,
            "failed": self.failed,
            "prompt_tokens": self._prompt_tokens,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "store_total": self._engine.stats()["store_total"],
        }

    def summary(self) -> str:
        """Return a line about the throughput."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return (
            f"{counted(self.answered, 'answer')} in {self._seconds:.3g} s: {rate:.3g} tok/s together, "
            f"{self._prompt_tokens:,} tokens of prompts and {self._tokens:,} of answers, "
            f"{self._concurrency.most} at once"
        )


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)
