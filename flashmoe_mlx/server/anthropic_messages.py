"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``, and the errors of the Anthropic API."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.anthropic_request import parse_messages
from flashmoe_mlx.server.calls import Call, read_fields, service_of
from flashmoe_mlx.server.conversation import Conversation
from flashmoe_mlx.server.errors import ApiError, anthropic_error
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    EndReason,
    Event,
    Failed,
    Finished,
    Reasoning,
    Text,
    Usage,
)
from flashmoe_mlx.server.lengths import LONGEST_COUNTED, least_tokens, texts_of
from flashmoe_mlx.server.service import Service
from flashmoe_mlx.server.streaming import EventStream, WholeAnswer, frame

_SIGNATURE = "unsigned"
"""The signature of thinking: clients drop thinking without one, and send it back as it is."""
_STOP_REASONS: Mapping[EndReason, str] = {
    "stop": "end_turn",
    "stop_string": "stop_sequence",
    "length": "max_tokens",
    "context": "model_context_window_exceeded",
    "tool_calls": "tool_use",
}


async def messages(request: Request) -> EventStream | WholeAnswer:
    """Answer a conversation."""
    call = await Call.read(request)
    fields, service = call.fields, call.service
    model = fields.required_text("model", 256)
    service.check_model(model)
    if "max_tokens" not in fields:
        fields.refuse("max_tokens", "is required", code="missing_field")
    conversation = parse_messages(fields, service.engine)
    stream = fields.flag("stream")

    async def prepare() -> Prepared:
        try:
            return await service.prepare(conversation)
        except InputError as error:
            if error.code != "prompt_too_long":
                raise
        raise _too_long(await _count(service, conversation), service.engine)

    answer = await call.answer(prepare)
    prompt_tokens = len(answer.prepared.request.prompt_ids)
    if stream:
        return call.stream(answer, MessageStream(model, prompt_tokens))
    return call.whole([answer], lambda events: _whole(model, prompt_tokens, events[0]))


async def count_tokens(request: Request) -> Response:
    """Count the tokens of a conversation, without waiting for the engine."""
    service, fields = service_of(request), await read_fields(request)
    service.check_model(fields.required_text("model", 256))
    conversation = parse_messages(fields, service.engine)
    return JSONResponse({"input_tokens": await _count(service, conversation)})


async def _count(service: Service, conversation: Conversation) -> int:
    engine = service.engine
    options = conversation.options

    def count() -> int:
        texts = list(texts_of(conversation.messages))
        least = least_tokens(texts, engine) if sum(map(len, texts)) > LONGEST_COUNTED else 0
        if least > engine.model.config.max_context:
            raise _too_long(least, engine)
        tokens = engine.encode(
            conversation.messages,
            tools=conversation.tools or None,
            enable_thinking=options["enable_thinking"],
            template_options=options["template_options"],
        )
        return len(tokens)

    return await service.outside(count)


def _too_long(count: int, engine: Engine) -> ApiError:
    """Return the error in the words by which Claude Code recognizes it."""
    most = engine.model.config.max_context
    return ApiError(f"prompt is too long: {count} tokens > {most} maximum", code="context_length_exceeded")


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the numbers of tokens; cached tokens of the prompt are counted apart from the rest of it."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
    }


class MessageStream:
    """The events of a streamed answer, and the message that they add up to.

    Args:
        model: the name of the model for the client.
        prompt_tokens: the number of tokens of the prompt.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": usage_json(Usage(prompt_tokens)),
        }
        self._open = False
        """Whether the last block is incomplete."""
        self._arguments = ""

    def opening(self) -> bytes:
        """Return the beginning of the message."""
        return _event("message_start", message=self.message)

    def ping(self) -> bytes:
        """Return an event that readers skip."""
        return _event("ping")

    def frames(self, event: Event) -> bytes:
        """Return the events of ``event``."""
        match event:
            case Text(text):
                return self._part("text", text, {"text": "", "citations": None})
            case Reasoning(text):
                return self._part("thinking", text, {"thinking": "", "signature": ""})
            case CallStarted(_, call_id, name):
                self._arguments = ""
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}, "caller": {"type": "direct"}}
                return self._end() + self._start(block)
            case CallArguments(_, text):
                self._arguments += text
                return self._delta("input_json_delta", partial_json=text)
            case CallEnded():
                return self._end()
            case Finished(reason, usage, stop):
                end = self._end()
                outcome = {"stop_reason": _STOP_REASONS[reason], "stop_sequence": stop}
                self.message |= outcome | {"usage": usage_json(usage)}
                delta = outcome | {"stop_details": None, "container": None}
                return end + _event("message_delta", delta=delta, usage=self.message["usage"]) + _event("message_stop")
            case Failed(error):
                return frame(anthropic_error(error), "error")
            case _:
                return b""

    def _part(self, kind: str, text: str, empty: Mapping[str, Any]) -> bytes:
        """Return the events of a part of a block of this kind, which may begin with it."""
        begin = b""
        if not self._open or self.message["content"][-1]["type"] != kind:
            begin = self._end() + self._start({"type": kind, **empty})
        self.message["content"][-1][kind] += text
        return begin + self._delta(f"{kind}_delta", **{kind: text})

    def _start(self, block: dict[str, Any]) -> bytes:
        self._open = True
        self.message["content"].append(block)
        return _event("content_block_start", index=len(self.message["content"]) - 1, content_block=block)

    def _delta(self, kind: str, **fields: str) -> bytes:
        index = len(self.message["content"]) - 1
        return _event("content_block_delta", index=index, delta={"type": kind, **fields})

    def _end(self) -> bytes:
        """Return the end of the block that is open, if one is."""
        if not self._open:
            return b""
        self._open = False
        block = self.message["content"][-1]
        signature = b""
        if block["type"] == "thinking":
            block["signature"] = _SIGNATURE
            signature = self._delta("signature_delta", signature=_SIGNATURE)
        elif block["type"] == "tool_use":
            block["input"] = _input(self._arguments)
        return signature + _event("content_block_stop", index=len(self.message["content"]) - 1)


def _input(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call; those of a call that was cut off are kept as text."""
    try:
        content = json.loads(arguments or "{}")
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"INVALID_JSON": arguments}


def _event(kind: str, **fields: Any) -> bytes:
    return frame({"type": kind, **fields}, kind)


def _whole(model: str, prompt_tokens: int, events: list[Event]) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    stream = MessageStream(model, prompt_tokens)
    for event in events:
        stream.frames(event)
    return stream.message
