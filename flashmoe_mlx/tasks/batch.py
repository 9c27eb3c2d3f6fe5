"""``task=batch``: answer a file of requests, several at once, and continue an interrupted run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flashmoe_mlx.console.output import activity, console, counted, print_notes, show
from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.generation.batch_file import AnswerFile, Line, read_batch
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.generation.scheduler import Scheduler
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.generation.text_stream import TextStream
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.tasks.shared.automatic import chosen_backend
from flashmoe_mlx.tasks.shared.keys import TEXT, PromptCacheConfig, cache_options, engine_options
from flashmoe_mlx.tasks.shared.model import model_folder, model_identity

_log = logging.getLogger(__name__)


@dataclass
class Config(PromptCacheConfig):
    """Keys of ``task=batch``."""

    input: str | None = field(default=None, metadata=TEXT)
    out: str | None = field(default=None, metadata=TEXT)
    together: int = 16
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
    folder = model_folder(config.model, config.backend)
    backend = chosen_backend(config.backend, folder, config.model, config.experts_k, config.prompt_cache_gib)
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
        with activity() as announce:
            loaded = load(
                folder,
                backend,
                config.experts_k,
                on_load=announce,
                **engine_options(config),
                **cache_options(config),
            )
        with loaded as engine:
            print_notes([engine.setup["note"]])
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
        together: the largest number of requests that are answered at once.
        defaults: options of requests that do not set them.
        model: the name of the model.
    """

    def __init__(self, engine: Engine, together: int, defaults: RequestOptions, model: str) -> None:
        self._engine = engine
        self._model = model
        self._scheduler = Scheduler(engine.runner, together)
        self._together = together
        self._defaults = defaults
        self.answered = self.failed = self._prompt_tokens = self._tokens = 0
        self._seconds = 0.0

    def answers(self, lines: list[Line]) -> Iterator[Mapping[str, Any]]:
        """Yield the line of each answer when it is complete."""
        start = perf_counter()
        following = iter(lines)
        active: dict[Sequence, tuple[Line, TextStream, list[str]]] = {}
        try:
            while True:
                # Requests are tokenized when there is room for them: a file may hold millions.
                while len(active) < self._together and (line := next(following, None)) is not None:
                    try:
                        options: RequestOptions = {**self._defaults, **line.options}
                        request = self._engine.request(line.prompt, **options)
                        sequence = self._engine.runner.begin(request)
                    except (InputError, TypeError) as error:
                        yield self._failure(line, error)
                        continue
                    active[sequence] = (line, TextStream(sequence, self._engine.tokenizer), ["", ""])
                    self._scheduler.add(sequence)
                if not active:
                    return
                with self._engine.runner.exclusive():
                    changed = self._scheduler.step()
                for change in changed:
                    line, text, parts = active[change.sequence]
                    if change.error is None:
                        piece = text.take()
                        if piece is not None:
                            parts[0] += piece.text
                            parts[1] += piece.reasoning
                    if change.error is not None:
                        del active[change.sequence]
                        yield self._failure(line, change.error)
                    elif change.sequence.finish_reason is not None:
                        del active[change.sequence]
                        yield self._answer(line, change.sequence, parts)
        finally:
            self._seconds = perf_counter() - start

    def _answer(self, line: Line, sequence: Sequence, parts: list[str]) -> Mapping[str, Any]:
        counts = len(sequence.request.prompt_ids), len(sequence.token_ids)
        self.answered += 1
        self._prompt_tokens += counts[0]
        self._tokens += counts[1]
        return line.answer(parts[0], parts[1], str(sequence.finish_reason), counts, self._model)

    def _failure(self, line: Line, error: Exception) -> Mapping[str, Any]:
        _log.warning("request %r: %s", line.key, error)
        self.failed += 1
        return line.failure(error)

    def record(self) -> dict[str, Any]:
        """Return the measurements in the form of ``batch.json``; seconds include prompts and answers."""
        return {
            **self._engine.setup,
            "together": self._together,
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
            f"{self._prompt_tokens:,} tokens of prompts and {self._tokens:,} of answers"
        )


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)
