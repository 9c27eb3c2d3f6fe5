"""Files of many requests and their answers, one JSON object a line: plain lines, or lines of the OpenAI batch API.

Source of the latter: https://platform.openai.com/docs/guides/batch.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.untrusted import parse_object
from flashmoe_mlx.paths import name_in_errors

_INVALID = "invalid_batch"
_URL = "/v1/chat/completions"
_SAME = ("max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty")
_PLAIN = (*_SAME, "top_k", "min_p", "repetition_penalty", "system")
"""Options of a plain line; they are arguments of ``Engine.request``."""
_OPENAI = {name: name for name in _SAME} | {"max_completion_tokens": "max_tokens"}
"""Fields of the body of an OpenAI line, with the arguments of ``Engine.request`` that they set."""
_ANSWER = {"text", "error", "response"}
"""Fields of which every answer has one."""
_MOST_BYTES = 64 * 2**20
"""Largest line in bytes."""


@dataclass(frozen=True)
class Line:
    """A request of a batch.

    Attributes:
        key: the name by which its answer is found: ``custom_id``, or else the number of the line.
        prompt: a user's message, or messages.
        options: arguments of ``Engine.request``.
        openai: whether the line has the form of the OpenAI batch API, as its answer then has.
    """

    key: str
    prompt: str | list[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    openai: bool = False

    def answer(
        self, text: str, reasoning: str, finish_reason: str, counts: tuple[int, int], model: str
    ) -> dict[str, Any]:
        """Return the line with the answer.

        Args:
            text: the answer.
            reasoning: the model's thinking.
            finish_reason: the reason why the answer ended.
            counts: the number of tokens of the prompt and of the answer.
            model: the name of the model.
        """
        prompt_tokens, completion_tokens = counts
        if not self.openai:
            return {
                "id": self.key,
                "text": text,
                **({"reasoning": reasoning} if reasoning else {}),
                "finish_reason": finish_reason,
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
            }
        message = {"role": "assistant", "content": text}
        body = {
            "id": f"chatcmpl-{self.key}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": message | ({"reasoning_content": reasoning} if reasoning else {}),
                    "finish_reason": finish_reason,
                    "logprobs": None,
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
        response = {"status_code": 200, "request_id": f"batch-{self.key}", "body": body}
        return {"id": f"batch-{self.key}", "custom_id": self.key, "response": response, "error": None}

    def failure(self, error: Exception) -> dict[str, Any]:
        """Return the line that reports ``error`` in place of an answer."""
        code = error.code if isinstance(error, FlashMoeError) else "internal_error"
        told = {"code": code, "message": str(error)}
        if not self.openai:
            return {"id": self.key, "error": told}
        return {"id": f"batch-{self.key}", "custom_id": self.key, "response": None, "error": told}


def read_batch(path: Path) -> list[Line]:
    """Read the requests in the file at ``path``; blank lines are left out.

    Raises:
        InputError: the file is missing, or a line is not a request (code "invalid_batch"); the error names the line.
    """
    lines: list[Line] = []
    keys: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(_bounded(file, path), 1):
                if not text.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    line = _parse(parse_object(text), number)
                except (InputError, ValueError) as error:
                    raise InputError(f"{place}: {error}", code=_INVALID) from None
                if line.key in keys:
                    raise InputError(f"{place}: a second line has the id {line.key!r}", code=_INVALID)
                keys.add(line.key)
                lines.append(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", code=_INVALID) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason})", code=_INVALID) from None
    if not lines:
        raise InputError(f"{path}: holds no requests", code=_INVALID)
    return lines


def _bounded(file: IO[str], path: Path) -> Iterator[str]:
    while text := file.readline(_MOST_BYTES):
        if len(text) == _MOST_BYTES:
            raise InputError(f"{path}: a line is longer than {_MOST_BYTES // 2**20} MiB", code=_INVALID)
        yield text


def _parse(content: Mapping[str, Any], number: int) -> Line:
    key = content.get("custom_id", content.get("id", str(number)))
    if not isinstance(key, str) or not key:
        raise InputError(f"the id is {key!r}; it must be text", code=_INVALID)
    if "body" in content or "url" in content:
        return _parse_openai(content, key)
    known = {"prompt", "messages", "id", "custom_id", *_PLAIN}
    if unknown := sorted(content.keys() - known):
        raise InputError(f"{unknown[0]}: no such field; a line has {', '.join(sorted(known))}", code=_INVALID)
    if ("prompt" in content) == ("messages" in content):
        raise InputError("a line needs either prompt or messages", code=_INVALID)
    prompt = content.get("prompt", content.get("messages"))
    if not isinstance(prompt, str if "prompt" in content else list):
        raise InputError("prompt must be text, and messages a list", code=_INVALID)
    return Line(key, prompt, {name: content[name] for name in _PLAIN if content.get(name) is not None})


def _parse_openai(content: Mapping[str, Any], key: str) -> Line:
    if content.get("method", "POST") != "POST" or content.get("url") != _URL:
        raise InputError(f"only POST requests to {_URL} can be answered", code=_INVALID)
    if "custom_id" not in content:
        raise InputError("custom_id is missing", code=_INVALID)
    body = content.get("body")
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
        raise InputError("body must be an object with a list of messages", code=_INVALID)
    for name, value in body.items():
        if name not in ("messages", "model", *_OPENAI) and value is not None:
            raise InputError(f"body.{name} is not supported", code=_INVALID)
    options = {argument: body[name] for name, argument in _OPENAI.items() if body.get(name) is not None}
    return Line(key, body["messages"], options, openai=True)


class AnswerFile:
    """The answers of a batch, appended line by line; each line is on disk before the next one is written.

    Args:
        path: the file. If it exists, it holds answers of an earlier run, whose keys are ``done``; a last line without
            an end is removed.

    Raises:
        InputError: the file cannot be written, or does not hold answers (code "invalid_batch").
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        try:
            with name_in_errors(path):
                self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})", code=_INVALID) from None
        try:
            self._file.seek(0)
            complete = 0
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                complete += len(line)
                self.done.add(_key_of(line, path))
            self._file.truncate(complete)
        except BaseException:
            self._file.close()
            raise

    def write(self, answer: Mapping[str, Any]) -> None:
        """Append ``answer`` and wait until it is on disk.

        Raises:
            OSError: the disk is full or gone; the error names the file.
        """
        with name_in_errors(self._path):
            self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _key_of(line: bytes, path: Path) -> str:
    try:
        content = parse_object(line.decode())
        key = content.get("custom_id", content.get("id")) if _ANSWER & content.keys() else None
    except (InputError, ValueError):
        key = None
    if not isinstance(key, str):
        raise InputError(f"{path}: holds other lines than answers; choose another out=", code=_INVALID)
    return key
