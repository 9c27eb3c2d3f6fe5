"""Documents of the corpus and their text in Qwen's chat markup, in which the model's answers are marked."""

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
"""End of a prompt, as the chat template writes it."""


@dataclass(slots=True)
class Document:
    """A plain text, or a chat whose last message is the answer.

    ``expected`` states how the answer is judged. ``sentences`` are all sentences with content, in lower case; they keep
    the training texts separate from the held-out set.
    """

    kind: str
    messages: Messages = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    expected: dict[str, Any] = field(default_factory=dict)
    sentences: set[str] = field(default_factory=set)

    def say(self, *sentences: str) -> str:
        """Return the joined sentences, and add them to ``sentences``."""
        self.sentences.update(sentence.lower() for sentence in sentences)
        return " ".join(sentences)


def tool_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a tool call in the markup of Qwen3.5."""
    parts = [f"<tool_call>\n<function={name}>\n"]
    for key, value in arguments.items():
        parts.append(f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n")
    return "".join(parts) + "</function>\n</tool_call>"


def answer_text(message: Mapping[str, Any]) -> str:
    """Return the text that the model writes for a message of the assistant."""
    calls = [tool_call_text(call["name"], call["arguments"]) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def segments(document: Document) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a document's text, each with a flag that tells whether the model writes it.

    Each piece is tokenized separately. The joined text equals the output of the chat template; ``check.py`` checks it.
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
            # The template omits the empty thinking of earlier answers.
            yield answer_text(message) + "<|im_end|>", True
            prompt = "\n"


def item(document: Document) -> dict[str, Any]:
    """Return the document as an item of the held-out set: the question, and the way to judge an answer."""
    if document.text:
        return {"kind": document.kind, "text": document.text}
    asked: dict[str, Any] = {"kind": document.kind, "messages": plain(document.messages[:-1])}
    if document.tools:
        asked["tools"] = document.tools
    return {**asked, "answer": answer_text(document.messages[-1]), **document.expected}


def plain(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return messages in the form of the chat template."""
    result = []
    for message in messages:
        calls = message.get("tool_calls")
        result.append({**message, "tool_calls": [{"type": "function", "function": call} for call in calls]} if calls
                      else dict(message))  # fmt: skip
    return result
