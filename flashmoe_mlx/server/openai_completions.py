"""``POST /v1/completions``: texts and token ids continued as they are, and log probabilities of prompts."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from starlette.requests import Request

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logprobs import TokenLogprobs
from flashmoe_mlx.generation.request import RequestOptions, make_request
from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.calls import Call
from flashmoe_mlx.server.errors import openai_error
from flashmoe_mlx.server.events import Event, Failed, Finished, PromptScored, Text, Usage
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.lengths import check_prompt_memory, refuse_long
from flashmoe_mlx.server.options import FINISH_REASONS, sampling_options, usage_json
from flashmoe_mlx.server.streaming import EventStream, WholeAnswer, frame
from flashmoe_mlx.text.tokenizer import Tokenizer

_DEFAULT_TOKENS = 16
_MOST_TOKENS = 2**31 - 1
_MOST_LOGPROBS = 20
_MOST_PROMPTS = 64
_LONGEST_PROMPT = 2**24
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The parts of a completion that a request asks for."""

    model: str
    tokenizer: Tokenizer
    echo: bool
    logprobs: bool
    generates: bool
    usage: bool


async def completions(request: Request) -> EventStream | WholeAnswer:
    """Continue one or several prompts."""
    call = await Call.read(request)
    fields, service = call.fields, call.service
    model = fields.required_text("model", 256)
    service.check_model(model)
    engine = service.engine
    prompts = _prompts(fields)
    if fields.text("suffix"):
        fields.refuse("suffix", "is not supported", code="unsupported")
    stream = fields.flag("stream")
    if stream and len(prompts) > 1:
        fields.refuse("prompt", "must be one prompt if the answer is streamed")
    echo = fields.flag("echo")
    limit = fields.integer("max_tokens", 0, _MOST_TOKENS)
    if limit == 0 and not echo:
        fields.refuse("max_tokens", "must be at least 1 without echo")
    options = _options(fields, engine, limit, echo=echo)
    stream_options = fields.object("stream_options")
    wanted = _Wanted(
        model,
        engine.tokenizer,
        echo,
        logprobs="logprobs" in options,
        generates=limit != 0,
        usage=stream_options is not None and stream_options.flag("include_usage"),
    )

    async def prepare(prompt: Prompt) -> Prepared:
        def make() -> Prepared:
            if isinstance(prompt, str):
                refuse_long([prompt], engine)
            tokens = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            tokens = engine.runner.checked_tokens(tokens)
            check_prompt_memory(len(tokens), engine)
            made = make_request(tokens, options, engine.sampling, engine.tokenizer)
            return Prepared(made, generates=wanted.generates)

        return await service.outside(make)

    answers = await call.answers([partial(prepare, prompt) for prompt in prompts])
    if stream:
        return call.stream(answers[0], _CompletionStream(wanted, answers[0].prepared.request.prompt_ids))
    prompt_ids = [answer.prepared.request.prompt_ids for answer in answers]
    return call.whole(answers, lambda events: _whole(wanted, prompt_ids, events))


def _prompts(fields: Fields) -> list[Prompt]:
    """Return the prompts: one text, several texts, one list of token ids, or several lists."""
    given = fields.any("prompt")
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        fields.refuse("prompt", "is required: text, token ids, or a list of either", code="missing_field")
    if all(type(token) is int for token in given):
        return [given]
    if len(given) > _MOST_PROMPTS:
        fields.refuse("prompt", f"must have at most {_MOST_PROMPTS} prompts, not {len(given)}")
    for prompt in given:
        if isinstance(prompt, str):
            if len(prompt) > _LONGEST_PROMPT:
                fields.refuse("prompt", f"must have at most {_LONGEST_PROMPT} characters")
        elif not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            fields.refuse("prompt", "must be text, token ids, or a list of either")
    return given


def _options(fields: Fields, engine: Engine, limit: int | None, *, echo: bool) -> RequestOptions:
    content = {**fields.content, "max_tokens": max(1, _DEFAULT_TOKENS if limit is None else limit)}
    options = sampling_options(Fields(content), engine)
    count = fields.integer("logprobs", 0, _MOST_LOGPROBS)
    if count is not None:
        options["logprobs"] = count
        options["prompt_logprobs"] = count if echo else None
    options["raw"] = True
    return cast(RequestOptions, options)


class _CompletionStream:
    """The chunks of a streamed completion."""

    def __init__(self, wanted: _Wanted, prompt_ids: list[int]) -> None:
        self._wanted = wanted
        self._prompt_ids = prompt_ids
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": wanted.model,
        }
        self._offset = 0

    def opening(self) -> bytes:
        """Return the prompt, if it is wanted without log probabilities; otherwise an event without text."""
        if self._wanted.echo and not self._wanted.logprobs:
            return self._chunk(self._wanted.tokenizer.decode(self._prompt_ids))
        return self._chunk("")

    def ping(self) -> bytes:
        """Return a comment, which readers skip."""
        return b": keep-alive\n\n"

    def frames(self, event: Event) -> bytes:
        """Return the chunks of an event."""
        match event:
            case PromptScored(logprobs) if self._wanted.logprobs:
                tokenizer = self._wanted.tokenizer
                return self._chunk(tokenizer.decode(self._prompt_ids), [self._prompt_ids[0], *logprobs])
            case Text(text, logprobs):
                return self._chunk(text, list(logprobs))
            case Finished(reason, usage):
                last = self._chunk("", finish_reason=FINISH_REASONS[reason])
                total = frame({**self._head, "choices": [], "usage": usage_json(usage)}) if self._wanted.usage else b""
                return last + total + b"data: [DONE]\n\n"
            case Failed(error):
                return frame(openai_error(error))
            case _:
                return b""

    def _chunk(self, text: str, entries: Sequence[TokenLogprobs | int] = (), finish_reason: str | None = None) -> bytes:
        logprobs = None
        if self._wanted.logprobs and entries:
            logprobs = _logprobs_json(self._wanted.tokenizer, entries, self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return frame({**self._head, "choices": [choice]})


def _whole(wanted: _Wanted, prompts: list[list[int]], answers: list[list[Event]]) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    choices = []
    total = Usage(0)
    for index, (prompt_ids, events) in enumerate(zip(prompts, answers, strict=True)):
        finished = events[-1]
        assert isinstance(finished, Finished)
        texts = [event for event in events if isinstance(event, Text)]
        text = "".join(event.text for event in texts)
        entries: list[TokenLogprobs | int] = [entry for event in texts for entry in event.logprobs]
        if wanted.echo:
            text = wanted.tokenizer.decode(prompt_ids) + text
            scored = [entry for event in events if isinstance(event, PromptScored) for entry in event.logprobs]
            entries = [prompt_ids[0], *scored, *entries]
        choice = {
            "index": index,
            "text": text,
            "logprobs": _logprobs_json(wanted.tokenizer, entries, 0) if wanted.logprobs else None,
            "finish_reason": FINISH_REASONS[finished.reason],
        }
        choices.append(choice)
        usage = finished.usage
        total = Usage(total.prompt + usage.prompt, total.cached + usage.cached, total.completion + usage.completion)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": wanted.model,
        "choices": choices,
        "usage": usage_json(total),
        "system_fingerprint": "flashmoe_mlx",
    }


def _logprobs_json(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | int], offset: int) -> dict[str, Any]:
    """Return log probabilities in the form of the API; a plain token id is the first of a prompt, which has none."""
    tokens: list[str] = []
    offsets: list[int] = []
    for entry in entries:
        tokens.append(_shown(tokenizer, entry if isinstance(entry, int) else entry.token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
    found = [None if isinstance(entry, int) else entry for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else max(entry.logprob, -9999.0) for entry in found],
        "top_logprobs": [
            None if entry is None else {_shown(tokenizer, token): max(value, -9999.0) for token, value in entry.top}
            for entry in found
        ],
        "text_offset": offsets,
    }


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token; bytes that are no text are spelled out, so that different tokens differ."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
