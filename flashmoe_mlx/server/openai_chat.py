"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.calls import Call
from flashmoe_mlx.server.chat_json import LogprobsJson, logprobs_writer, parse_conversation, whole_answer
from flashmoe_mlx.server.errors import openai_error
from flashmoe_mlx.server.events import CallArguments, CallStarted, Event, Failed, Finished, Reasoning, Text
from flashmoe_mlx.server.options import FINISH_REASONS, usage_json
from flashmoe_mlx.server.streaming import EventStream, WholeAnswer, frame


async def chat_completions(request: Request) -> EventStream | WholeAnswer:
    """Answer a conversation."""
    call = await Call.read(request)
    fields, service = call.fields, call.service
    model = fields.required_text("model", 256)
    service.check_model(model)
    engine = service.engine
    conversation = parse_conversation(fields, engine)
    stream = fields.flag("stream")
    stream_options = fields.object("stream_options")
    usage = stream_options is not None and stream_options.flag("include_usage")

    async def prepare() -> Prepared:
        return await service.prepare(conversation)

    answer = await call.answer(prepare)
    wanted = conversation.options.get("logprobs") is not None
    logprobs = logprobs_writer(engine) if wanted else lambda _: None
    if stream:
        return call.stream(answer, _ChatStream(model, logprobs, usage=usage))
    return call.whole([answer], lambda events: whole_answer(model, events, logprobs))


class _ChatStream:
    """The chunks of a streamed answer. Later parts of a call omit its id and name, since clients join repeated ones."""

    def __init__(self, model: str, logprobs: LogprobsJson, *, usage: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        self._usage = usage

    def opening(self) -> bytes:
        """Return the chunk with the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def ping(self) -> bytes:
        """Return a comment, which readers skip."""
        return b": keep-alive\n\n"

    def frames(self, event: Event) -> bytes:
        """Return the chunks of an event."""
        match event:
            case Text(text, logprobs):
                return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))
            case Reasoning(text):
                return self._chunk({"reasoning_content": text})
            case CallStarted(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return self._chunk({"tool_calls": [call]})
            case CallArguments(index, text):
                return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
            case Finished(reason, usage):
                last = self._chunk({}, FINISH_REASONS[reason])
                total = frame({**self._head, "choices": [], "usage": usage_json(usage)}) if self._usage else b""
                return last + total + b"data: [DONE]\n\n"
            case Failed(error):
                return frame(openai_error(error))
            case _:
                return b""

    def _chunk(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return frame({**self._head, "choices": [choice]})
