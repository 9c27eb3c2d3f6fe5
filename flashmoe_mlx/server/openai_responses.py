"""``POST /v1/responses``."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from flashmoe_mlx.server.answer import Prepared
from flashmoe_mlx.server.calls import Call
from flashmoe_mlx.server.errors import ApiError
from flashmoe_mlx.server.events import (
    CallArguments,
    CallEnded,
    CallStarted,
    Event,
    Failed,
    Finished,
    Reasoning,
    Text,
    Usage,
)
from flashmoe_mlx.server.fields import Fields
from flashmoe_mlx.server.responses_request import parse_input
from flashmoe_mlx.server.streaming import EventStream, WholeAnswer, frame

_DEFAULTS: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_logprobs": 0,
    "tool_choice": "auto",
    "truncation": "disabled",
    "user": None,
}
"""Fields of a request that a response repeats, with the values of absent ones."""


async def responses(request: Request) -> EventStream | WholeAnswer:
    """Answer a list of items."""
    call = await Call.read(request)
    fields, service = call.fields, call.service
    model = fields.required_text("model", 256)
    service.check_model(model)
    conversation = parse_input(fields, service.engine)
    stream = fields.flag("stream")

    async def prepare() -> Prepared:
        return await service.prepare(conversation)

    answer = await call.answer(prepare)
    if stream:
        return call.stream(answer, ResponseStream(model, fields))
    return call.whole([answer], lambda events: _whole(model, fields, events[0]))


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the numbers of tokens."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


class ResponseStream:
    """The events of a streamed response, and the response that they add up to.

    Args:
        model: the name of the model for the client.
        fields: the fields of the request.
    """

    def __init__(self, model: str, fields: Fields) -> None:
        given = fields.content
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(given.get("reasoning") or {})},
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}, "verbosity": "medium", **(given.get("text") or {})},
            "tools": [_tool(tool) for tool in given.get("tools") or []],
            "usage": None,
            **{name: default if given.get(name) is None else given[name] for name, default in _DEFAULTS.items()},
        }
        self._sent = 0
        self._open = False
        """Whether the last item is incomplete."""

    def opening(self) -> bytes:
        """Return the events before the prompt is processed."""
        return self._state("response.created") + self._state("response.in_progress")

    def ping(self) -> bytes:
        """Return an event without news: some clients do not take comments for activity."""
        return self._state("response.in_progress")

    def frames(self, event: Event) -> bytes:
        """Return the events of ``event``."""
        match event:
            case Text(text):
                return self._text("message", text)
            case Reasoning(text):
                return self._text("reasoning", text)
            case CallStarted(_, call_id, name):
                call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                return self._end() + self._start("fc", call)
            case CallArguments(_, text):
                self._item["arguments"] += text
                return self._item_event("response.function_call_arguments.delta", delta=text)
            case CallEnded():
                return self._end()
            case Finished():
                return self._finish(event)
            case Failed(error):
                self.response |= {"status": "failed", "error": _error(error)}
                return self._state("response.failed")
            case _:
                return b""

    def _finish(self, event: Finished) -> bytes:
        cut = event.reason in ("length", "context")
        status = "incomplete" if cut else "completed"
        end = self._end(status)
        self.response |= {
            "status": status,
            "usage": usage_json(event.usage),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }
        return end + self._state(f"response.{status}")

    @property
    def _item(self) -> dict[str, Any]:
        """The last item."""
        item: dict[str, Any] = self.response["output"][-1]
        return item

    def _text(self, kind: str, text: str) -> bytes:
        """Return the events of a part of the answer or of thinking, which may begin with it."""
        begin = b""
        if not self._open or self._item["type"] != kind:
            begin = self._end()
            if kind == "message":
                begin += self._start("msg", {"type": kind, "role": "assistant", "content": []})
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            else:
                thinking: dict[str, Any] = {"type": kind, "summary": [], "content": []}
                begin += self._start("rs", thinking)
                part = {"type": "reasoning_text", "text": ""}
            begin += self._part("response.content_part.added", part=part)
            self._item["content"].append(part)
        part = self._item["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return begin + self._part(f"response.{part['type']}.delta", delta=text, **extra)

    def _start(self, prefix: str, item: dict[str, Any]) -> bytes:
        self._open = True
        self.response["output"].append({"id": f"{prefix}_{uuid.uuid4().hex}", **item, "status": "in_progress"})
        return self._output("response.output_item.added")

    def _end(self, status: str = "completed") -> bytes:
        """Return the end of the item that is open, if one is."""
        if not self._open:
            return b""
        self._open = False
        item = self._item
        item["status"] = status
        if item["type"] == "function_call":
            done = self._item_event(
                "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
            )
        else:
            (part,) = item["content"]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            done = self._part(f"response.{part['type']}.done", text=part["text"], **extra)
            done += self._part("response.content_part.done", part=part)
        return done + self._output("response.output_item.done")

    def _state(self, kind: str) -> bytes:
        return self._event(kind, response=self.response)

    def _output(self, kind: str) -> bytes:
        return self._event(kind, output_index=len(self.response["output"]) - 1, item=self._item)

    def _part(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        index = len(self.response["output"]) - 1
        return self._event(kind, item_id=self._item["id"], output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sent += 1
        return frame({"type": kind, "sequence_number": self._sent - 1, **fields}, kind)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as the response repeats it: functions with all their fields."""
    if tool.get("type") != "function":
        return dict(tool)
    return {"description": None, "parameters": None, "strict": None, **tool}


def _error(error: ApiError) -> dict[str, Any]:
    return {"code": error.code if error.status < 500 else "server_error", "message": str(error)}


def _whole(model: str, fields: Fields, events: list[Event]) -> dict[str, Any]:
    """Return the body of a response that is not streamed."""
    stream = ResponseStream(model, fields)
    for event in events:
        stream.frames(event)
    return stream.response
