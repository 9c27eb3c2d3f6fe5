"""A document of the corpus, and how it becomes text: Qwen's chat markup, with the answers told apart."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]

TOOLS_BEFORE = "<|im_start|>system\n# Tools\n\nYou may call these functions:\n\n<tools>"
TOOLS_AFTER = (
    "\n</tools>\n\nTo call one, write:\n\n<tool_call>\n<function=NAME>\n<parameter=NAME>\nVALUE\n</parameter>\n"
    "</function>\n</tool_call>"
)
ANSWER_START = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""What the chat template ends a prompt with."""


@dataclass(slots=True)
class Document:
    """A plain text, or a chat whose last message is the answer; ``expected`` says how to judge it.

    ``sentences``: every sentence that says something, in lower case, by which training and held-out parts are told
    apart.
    """

    kind: str
    messages: Messages = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    expected: dict[str, Any] = field(default_factory=dict)
    sentences: set[str] = field(default_factory=set)

    def say(self, *sentences: str) -> str:
        """The sentences in a row, noted as said."""
        self.sentences.update(sentence.lower() for sentence in sentences)
        return " ".join(sentences)


def tool_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call in the markup of Qwen3.5."""
    parts = [f"<tool_call>\n<function={name}>\n"]
    for key, value in arguments.items():
        parts.append(f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n")
    return "".join(parts) + "</function>\n</tool_call>"


def answer_text(message: Mapping[str, Any]) -> str:
    """What the model writes for an assistant's message."""
    calls = [tool_call_text(call["name"], call["arguments"]) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def segments(document: Document) -> Iterator[tuple[str, bool]]:
    """Pieces of the document's text and whether each is the model's own; they are tokenised one by one.

    The same text as the chat template gives, which ``check.py`` holds against it.
    """
    if document.text:
        yield document.text + "<|endoftext|>", True
        return
    messages = document.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    prompt = ""
    if document.tools:
        prompt += TOOLS_BEFORE + "".join("\n" + json.dumps(tool) for tool in document.tools) + TOOLS_AFTER
        prompt += ("\n\n" + system if system else "") + "<|im_end|>\n"
    elif system:
        prompt += "<|im_start|>system\n" + system + "<|im_end|>\n"
    last = len(messages) - 1
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "user":
            prompt += "<|im_start|>user\n" + message["content"] + "<|im_end|>\n"
        elif role == "tool":
            prompt += "<|im_start|>user\n<tool_response>\n" + message["content"] + "\n</tool_response><|im_end|>\n"
        elif role == "assistant":
            yield prompt + (ANSWER_START if index == last else "<|im_start|>assistant\n"), False
            # Earlier answers stand without the empty thought that began them.
            yield answer_text(message) + "<|im_end|>", True
            prompt = "\n"


def item(document: Document) -> dict[str, Any]:
    """The document as a line of the held-out set: what is asked, and how the answer is judged."""
    if document.text:
        return {"kind": document.kind, "text": document.text}
    asked: dict[str, Any] = {"kind": document.kind, "messages": plain(document.messages[:-1])}
    if document.tools:
        asked["tools"] = document.tools
    return {**asked, "answer": answer_text(document.messages[-1]), **document.expected}


def plain(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Messages as the chat template takes them."""
    result = []
    for message in messages:
        calls = message.get("tool_calls")
        result.append({**message, "tool_calls": [{"type": "function", "function": call} for call in calls]} if calls
                      else dict(message))  # fmt: skip
    return result
