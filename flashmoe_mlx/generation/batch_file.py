"""Files of many requests and their answers, one JSON object on each line, plain or of the OpenAI batch API.

Source of the OpenAI format: https://platform.openai.com/docs/guides/batch.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import parse_object
from flashmoe_mlx.generation.request import RequestOptions
from flashmoe_mlx.paths import name_in_errors

_INVALID = "invalid_batch"
_URL = "/v1/chat/completions"
_PLAIN = (
    "max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "system", "stop_token_ids", "min_tokens", "logit_bias", "schema", "json_object", "grammar",
    "regex", "choices",
)  # fmt: skip
"""Options of a plain line; they are arguments of ``Engine.request``."""
_ANSWER = {"text", "error", "response"}
"""Fields of answers; every answer has at least one of them."""
_BEGIN = b'{"id": "'
"""The first bytes of every answer."""
_LONGEST = 64 * 2**20
"""Number of characters that no line may reach."""


@dataclass(frozen=True)
class Line:
    """A request of a batch.

    Attributes:
        key: the name that the request shares with its answer: ``custom_id``, ``id``, or the number of the line.
        prompt: a user's message, or messages; empty in a line with a ``body`` or an ``error``.
        options: the options of the answer, of which ``Engine.request`` checks the values.
        body: the request of a line of the OpenAI batch API; None in a plain line.
        error: the reason why the line is not a request; None if it is one.
    """

    key: str
    prompt: str | list[dict[str, Any]] = ""
    options: RequestOptions = field(default_factory=RequestOptions)
    body: Mapping[str, Any] | None = None
    error: InputError | None = None

    def answer(self, text: str, reasoning: str, finish_reason: str, counts: tuple[int, int]) -> dict[str, Any]:
        """Return the answer to a plain line.

        Args:
            text: the answer.
            reasoning: the model's thinking.
            finish_reason: the reason why the answer ended.
            counts: the number of tokens of the prompt and of the answer.
        """
        return {
            "id": self.key,
            "text": text,
            **({"reasoning": reasoning} if reasoning else {}),
            "finish_reason": finish_reason,
            "prompt_tokens": counts[0],
            "completion_tokens": counts[1],
        }

    def response(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a line of the OpenAI batch API, with the ``body`` of a response of the chat API."""
        response = {"status_code": 200, "request_id": f"batch-{self.key}", "body": body}
        return {"id": f"batch-{self.key}", "custom_id": self.key, "response": response, "error": None}

    def failure(self, error: Exception) -> dict[str, Any]:
        """Return the line that reports ``error`` in place of an answer."""
        code = error.code if isinstance(error, FlashMoeError) else "internal_error"
        told = {"code": code, "message": str(error)}
        if self.body is None:
            return {"id": self.key, "error": told}
        return {"id": f"batch-{self.key}", "custom_id": self.key, "response": None, "error": told}


def read_batch(path: Path) -> list[Line]:
    """Read the requests in the file at ``path``; skip blank lines.

    A line that is not a request has an ``error``, which names the line; a file without any request is refused.

    Raises:
        InputError: the file is missing, holds no request, or holds two lines with one key; code "invalid_batch".
    """
    lines: list[Line] = []
    keys: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(_bounded(file, path), 1):
                if not text.strip():
                    continue
                place = f"{path}:{number}"
                line = _parse_line(text.strip(), number, place)
                if line.key in keys:
                    raise InputError(f"{place}: a second line has the id {line.key!r}", code=_INVALID)
                keys.add(line.key)
                lines.append(line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", code=_INVALID) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason})", code=_INVALID) from None
    if all(line.error is not None for line in lines):
        raise lines[0].error or InputError("") if lines else InputError(f"{path}: holds no requests", code=_INVALID)
    return lines


def _bounded(file: IO[str], path: Path) -> Iterator[str]:
    number = 0
    while text := file.readline(_LONGEST):
        number += 1
        if len(text) == _LONGEST:
            raise InputError(f"{path}:{number}: the line is longer than {_LONGEST:,} characters", code=_INVALID)
        yield text


def _parse_line(text: str, number: int, place: str) -> Line:
    """Return the line number ``number``; errors begin with its ``place``."""
    key, body = str(number), None
    try:
        content = parse_object(text)
        given = content.get("custom_id", content.get("id", key))
        if not isinstance(given, str) or not given:
            raise InputError(f"the id is {given!r:.60}; it must be text")
        key = given
        if "body" not in content and "url" not in content:
            return _parse_plain(content, key)
        body = content.get("body")
        body = body if isinstance(body, Mapping) else {}
        if "custom_id" not in content:
            raise InputError("custom_id is missing")
        if content.get("method", "POST") != "POST" or content.get("url") != _URL:
            raise InputError(f"only POST requests to {_URL} can be answered")
        if not isinstance(body.get("messages"), list):
            raise InputError("body must be an object with a list of messages")
        return Line(key, body=body)
    except (InputError, ValueError) as error:
        return Line(key, body=body, error=InputError(f"{place}: {error}", code=_INVALID))


def _parse_plain(content: Mapping[str, Any], key: str) -> Line:
    known = {"prompt", "messages", "id", "custom_id", *_PLAIN}
    if unknown := sorted(content.keys() - known):
        raise InputError(f"{unknown[0]}: no such field; a line has {', '.join(sorted(known))}")
    if ("prompt" in content) == ("messages" in content):
        raise InputError("a line needs either prompt or messages")
    prompt = content.get("prompt", content.get("messages"))
    if not isinstance(prompt, str if "prompt" in content else list):
        raise InputError("prompt must be text, and messages a list")
    options = {name: content[name] for name in _PLAIN if content.get(name) is not None}
    if not isinstance(options.get("stop", ""), str | list):
        raise InputError("stop must be text or a list of texts")
    return Line(key, prompt, cast(RequestOptions, options))


class AnswerFile:
    """The answers of a batch, appended line by line; each line is on disk before the next one is written.

    The file is locked until it is closed. If it exists, it holds the answers of an earlier run. Lines of failed
    requests are removed, so that these requests are tried again; so is an incomplete last line.

    Args:
        path: the file.

    Attributes:
        done: the keys of the answers in the file.

    Raises:
        InputError: the file cannot be written, holds anything but answers, or belongs to another process (code
            "invalid_batch").
        OSError: lines cannot be removed, for instance because the disk is full; the error names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        self._file = _open_locked(path)
        try:
            kept = self._read()
            if kept is not None:
                write_atomically(path.resolve(), kept)  # a symbolic link stays
                replaced, self._file = self._file, _open_locked(path)
                replaced.close()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> bytes | None:
        """Collect the keys of the answers; return the lines to keep, or None to keep all."""
        lines: list[bytes] = []
        all_kept = True
        for line in self._file:
            key = None
            if line.endswith(b"\n"):
                key = _key_of(line, self._path)
            elif not lines and all_kept and not _may_be_part_of_an_answer(line):
                raise _holds_other_lines(self._path)  # never truncate a file that is not ours
            if key is None:
                all_kept = False
            else:
                self.done.add(key)
                lines.append(line)
        return None if all_kept else b"".join(lines)

    def write(self, answer: Mapping[str, Any]) -> None:
        """Append ``answer`` and wait until it is on disk.

        Raises:
            OSError: the disk is full or gone; the error names the file.
        """
        with name_in_errors(self._path):
            self._file.write(_encode(answer))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_locked(path: Path) -> IO[bytes]:
    """Open ``path`` for reading and appending, at its beginning, and lock it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", code=_INVALID) from None
    file = os.fdopen(fd, "r+b")
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputError(f"{path}: is not a regular file; choose another out=", code=_INVALID)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):  # another process replaced it since it was opened here
            raise BlockingIOError
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another process is writing this file; wait until it ends", code=_INVALID) from None
    except OSError as error:
        file.close()
        raise InputError(f"{path}: cannot be locked ({error.strerror}); choose another out=", code=_INVALID) from None
    except BaseException:
        file.close()
        raise
    return file


def _encode(answer: Mapping[str, Any]) -> bytes:
    """Return the line of ``answer``; half of a surrogate pair, which UTF-8 cannot hold, becomes an escape of JSON."""
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _may_be_part_of_an_answer(line: bytes) -> bool:
    """Return whether ``line``, without an end, may be what an interrupted run has written."""
    if not line.startswith(_BEGIN):
        return _BEGIN.startswith(line)
    try:
        return bool(_ANSWER & parse_object(line.decode()).keys())
    except ValueError:
        return True


def _holds_other_lines(path: Path) -> InputError:
    return InputError(f"{path}: holds other lines than answers; choose another out=", code=_INVALID)


def _key_of(line: bytes, path: Path) -> str | None:
    """Return the key of the answer in ``line``; None if its request failed."""
    try:
        content = parse_object(line.decode())
    except ValueError:
        raise _holds_other_lines(path) from None
    key = content.get("custom_id", content.get("id"))
    if not _ANSWER & content.keys() or not isinstance(key, str):
        raise _holds_other_lines(path)
    return key if content.get("error") is None else None
