"""A conversation: messages in the form of the OpenAI API, and files that hold them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import parse_object, read_text
from flashmoe_mlx.text.messages import normalize_messages
from flashmoe_mlx.text.tool_formats.calls import ToolCall

_FORMAT = "flashmoe_mlx chat"
_VERSION = 1
_LARGEST_FILE = 256 * 2**20
_INVALID = "invalid_conversation"


class Conversation:
    """The messages of a chat.

    Attributes:
        system: the system message; None for none.
        turns: all other messages.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.turns

    def add_user(self, text: str) -> None:
        """Append a message of the user."""
        self.turns.append({"role": "user", "content": text})

    def add_answer(self, text: str, reasoning: str, calls: Sequence[ToolCall]) -> None:
        """Append an answer of the model, with its thinking and its calls of tools."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{len(self.turns)}_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(calls)
            ]
        self.turns.append(message)

    def add_result(self, call_id: str, text: str) -> None:
        """Append the result of the call ``call_id``."""
        self.turns.append({"role": "tool", "tool_call_id": call_id, "content": text})

    @property
    def latest_question(self) -> str | None:
        """The latest message of the user; None if there is none."""
        return next((turn["content"] for turn in reversed(self.turns) if turn["role"] == "user"), None)

    @property
    def latest_answer(self) -> dict[str, Any] | None:
        """The latest answer of the model; None if there is none."""
        return next((turn for turn in reversed(self.turns) if turn["role"] == "assistant"), None)

    def take_question(self) -> str | None:
        """Remove the latest message of the user and everything after it; return its text, or None if there is none."""
        for index in range(len(self.turns) - 1, -1, -1):
            if self.turns[index]["role"] == "user":
                text: str = self.turns[index]["content"]
                del self.turns[index:]
                return text
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the content of a file."""
        return {"format": _FORMAT, "version": _VERSION, "system": self.system, "messages": self.turns}

    def save(self, path: Path) -> None:
        """Write the conversation to ``path``, which is replaced only if it holds a conversation.

        Raises:
            InputError: ``path`` holds something else (code "invalid_conversation"), or cannot be read.
            OSError: the file cannot be written; the error names it.
        """
        if path.exists():
            _read(path)
        write_atomically(path, json.dumps(self.to_json(), indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a conversation from ``path``.

        Raises:
            InputError: there is no such file, or it does not hold a conversation (code "invalid_conversation").
        """
        content = _read(path)
        system, turns = content.get("system"), content.get("messages")
        if not isinstance(system, str | None) or not isinstance(turns, list):
            raise InputError(f"{path}: system must be text, and messages a list", code=_INVALID)
        for index, turn in enumerate(turns):
            if not _is_turn(turn):
                raise InputError(f"{path}: messages[{index}] is not a message of a chat", code=_INVALID)
        if turns:
            normalize_messages(turns)
        found = cls(system)
        found.turns = turns
        return found


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, _LARGEST_FILE)
    if text is None:
        raise InputError(f"{path}: no such file", code=_INVALID)
    try:
        content = parse_object(text)
    except ValueError as error:
        raise InputError(f"{path} {error}", code=_INVALID) from None
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise InputError(f"{path}: does not hold a conversation of task=chat", code=_INVALID)
    return content


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, Mapping)
        and turn.get("role") in ("user", "assistant", "tool")
        and isinstance(turn.get("content"), str)
        and isinstance(turn.get("reasoning_content", ""), str)
        and isinstance(turn.get("tool_calls", []), list)
    )
