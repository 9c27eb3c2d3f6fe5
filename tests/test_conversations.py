"""Whole conversations with the published template of Qwen3.5: each turn computes its new tokens only."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from published import published_file, published_templates

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logits import Logits, TokenHistory
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.prompt_cache.cache import PromptCache
from flashmoe_mlx.made_models import synthetic
from flashmoe_mlx.text.chat_template import ChatTemplate
from flashmoe_mlx.text.tool_calls import parse_tool_calls

_TEMPLATE = "Qwen3.5-397B-A17B/chat_template.jinja"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "whole": {"type": "boolean"}, "lines": {"type": "array"}},
            },
        },
    }
]
HEADER = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A small model with tokens that are bytes, or with a "published" vocabulary."""
    template = published_templates().get(_TEMPLATE)
    if template is None:
        pytest.skip("needs the archive of published templates")
    with pytest.MonkeyPatch.context() as patch:
        if getattr(request, "param", "bytes") == "published":
            patch.setattr(synthetic, "write_byte_tokenizer", write_published_tokenizer)
        pack = synthetic.synthetic_pack("talk", replace(TINY, max_context=2**16), tmp_path_factory.mktemp("model"))
    with flashmoe_mlx.load(pack.folder) as opened:
        opened.tokenizer.chat_template = ChatTemplate(template, {})
        opened.runner.prompt_cache = PromptCache(2**28, opened.model.state_bytes, opened.tokenizer)
        yield opened


def write_published_tokenizer(folder: Path) -> int:
    """Write the tokenizer of Qwen3 to ``folder`` and return the size of its vocabulary, padded as published."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(published_file(f"Qwen3-30B-A3B/{name}") or b"")
    return 151_936


class Script:
    """A logits processor that makes the model write given tokens."""

    def __init__(self, token_ids: list[int]) -> None:
        self._tokens = iter(token_ids)

    def __call__(self, logits: Logits, _: TokenHistory) -> Logits:
        forced = np.full_like(logits, -np.inf)
        forced[next(self._tokens)] = 0
        return forced


def answer(engine: Engine, messages: list[dict[str, Any]], text: str, tools: Any = TOOLS) -> RunMetrics:
    """Answer ``messages`` with ``text``, which the model is made to write."""
    tokens = engine.tokenizer.encode(f"{text}<|im_end|>")
    generation = engine.generate(
        messages, tools=tools, temperature=0, max_tokens=len(tokens), logits_processors=[Script(tokens)]
    )
    assert [token for piece in generation for token in piece.token_ids] == tokens
    return generation.metrics


def size(engine: Engine, text: str) -> int:
    return len(engine.tokenizer.encode(text))


@pytest.mark.parametrize("returns_reasoning", [True, False])
@pytest.mark.parametrize(
    ("engine", "turns"),
    [("bytes", 5), pytest.param("published", 20, marks=pytest.mark.thorough)],
    indirect=["engine"],
)
@pytest.mark.sampled(1)
def test_turns_of_a_conversation(engine: Engine, turns: int, returns_reasoning: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"Be brief. {returns_reasoning} {turns}"}]
    allowed = None
    for turn in range(turns):
        question, thought, said = f"Question number {turn}?", f"I think about {turn}.", f"It is {turn * turn}."
        messages.append({"role": "user", "content": question})
        metrics = answer(engine, messages, f"{thought}\n</think>\n\n{said}")
        assert metrics.prompt_tokens == metrics.reused_tokens + metrics.computed_tokens
        if allowed is not None:
            new = f"{said}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n{HEADER}"
            assert metrics.computed_tokens <= size(engine, new) + size(engine, HEADER) + 2
        allowed = size(engine, said)
        messages.append({"role": "assistant", "content": said})
        if returns_reasoning:
            messages[-1]["reasoning_content"] = thought


@pytest.mark.parametrize(
    ("engine", "steps"),
    [("bytes", 6), pytest.param("published", 30, marks=pytest.mark.thorough)],
    indirect=["engine"],
)
@pytest.mark.thorough
def test_a_tool_loop(engine: Engine, steps: int) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Read {steps} files."}]
    for step in range(steps):
        client = ("verbatim", "drops reasoning", "reformats")[step % 3]
        call = (
            f"<tool_call>\n<function=read_file>\n<parameter=path>\n/src/{step}.c\n</parameter>\n"
            '<parameter=whole>\ntrue\n</parameter>\n<parameter=lines>\n[1,{"a":2.0}]\n</parameter>\n'
            "</function>\n</tool_call>"
        )
        separator = "\n" if client == "reformats" else "\n\n"
        metrics = answer(engine, messages, f"File {step} is next.\n</think>\n\nI read it.{separator}{call}")
        if step:
            result = f"<tool_response>\nfile {step - 1}\n</tool_response>"
            new = f"<|im_end|>\n<|im_start|>user\n{result}<|im_end|>\n{HEADER}"
            assert metrics.computed_tokens <= size(engine, new)
        _, (parsed,) = parse_tool_calls(call, TOOLS)
        function = {"name": parsed.name, "arguments": json.dumps(parsed.arguments)}
        messages.append(
            {
                "role": "assistant",
                "content": "I read it.",
                "tool_calls": [{"id": f"call_{step}", "type": "function", "function": function}],
            }
        )
        if client != "drops reasoning":
            messages[-1]["reasoning_content"] = f"File {step} is next."
        messages.append({"role": "tool", "tool_call_id": f"call_{step}", "content": f"file {step}"})


def test_conversations_share_tools_and_system_message(engine: Engine) -> None:
    system = {"role": "system", "content": "You know a shared system message."}
    first = answer(engine, [system, {"role": "user", "content": "One"}], "a\n</think>\n\nb")
    second = answer(engine, [system, {"role": "user", "content": "Two"}], "a\n</think>\n\nb")
    shared = engine.encode([system, {"role": "user", "content": ""}], tools=TOOLS)
    user = size(engine, f"<|im_start|>user\n<|im_end|>\n{HEADER}")
    assert (first.reused_tokens == 0, second.reused_tokens) == (True, len(shared) - user)


def test_an_edited_answer_stays_edited(engine: Engine) -> None:
    question = {"role": "user", "content": "Say a number."}
    answer(engine, [question], "One.\n</think>\n\nOne", tools=None)
    edited = [question, {"role": "assistant", "content": "Two"}, {"role": "user", "content": "Why?"}]
    rendered = engine.encode(edited)
    generation = engine.generate(edited, max_tokens=1)
    assert generation.request.prompt_ids == rendered
    for _ in generation:
        pass
