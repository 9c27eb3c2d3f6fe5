"""``/v1/completions``: prompts of text and of tokens, echo, and log probabilities as evaluations ask for them."""

from typing import Any

import numpy as np
import pytest
from serving import Live

from flashmoe_mlx.engine import load

PATH = "/v1/completions"
TEXT = "The village of Larkrise lies"


def complete(live: Live, **fields: Any) -> dict[str, Any]:
    return live.post(PATH, model="demo", temperature=0, **fields)


def test_text_and_tokens_give_the_same_continuation(live: Live) -> None:
    tokens = live.post("/tokenize", prompt=TEXT)["tokens"]
    assert live.post("/detokenize", tokens=tokens)["prompt"] == TEXT
    by_text, by_tokens = (complete(live, prompt=prompt, max_tokens=8) for prompt in (TEXT, tokens))
    assert by_text["choices"] == by_tokens["choices"]
    assert by_text["object"] == "text_completion"
    assert by_text["usage"]["completion_tokens"] == 8
    several = complete(live, prompt=[TEXT, TEXT], max_tokens=8)["choices"]
    assert [choice["index"] for choice in several] == [0, 1]
    assert {choice["text"] for choice in several} == {by_text["choices"][0]["text"]}
    echoed = complete(live, prompt=TEXT, max_tokens=8, echo=True)["choices"][0]["text"]
    assert echoed == TEXT + by_text["choices"][0]["text"]


def test_a_streamed_completion_equals_the_whole_one(live: Live) -> None:
    for extra in ({}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 2}):
        fields = {"prompt": TEXT, "max_tokens": 6, **extra}
        whole = complete(live, **fields)["choices"][0]
        chunks = live.stream(PATH, **fields)
        assert chunks[-1] == "[DONE]"
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert choices[-1]["finish_reason"] == "length"
        for name in ("tokens", "token_logprobs", "text_offset") if "logprobs" in extra else ():
            joined = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"][name]]
            expected = whole["logprobs"][name]
            assert [*map(type, joined)] == [*map(type, expected)]
            assert joined == expected or joined[1:] == pytest.approx(expected[1:], abs=1e-4)


def test_log_likelihoods_equal_the_logits_of_the_model(live: Live, demo_pack: Any) -> None:
    """The request is that of lm-eval's ``local-completions``."""
    context = live.post("/tokenize", prompt="17 plus 25")["tokens"]
    tokens = context + live.post("/tokenize", prompt=" is 42.")["tokens"]
    fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    choice = live.post(PATH, model="demo", prompt=[tokens], **fields)["choices"][0]
    values, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    assert len(values) == len(top) == len(tokens) + 1
    assert values[0] is top[0] is None
    with load(demo_pack) as engine:
        logits = engine.logits(tokens).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    rows = range(len(tokens) - 1)
    np.testing.assert_allclose(values[1:-1], [expected[row, tokens[row + 1]] for row in rows], atol=1e-4)
    greedy = [value == max(likely.values()) for value, likely in zip(values[1:], top[1:], strict=True)]
    assert greedy == [*(int(expected[row].argmax()) == tokens[row + 1] for row in rows), True]
    assert choice["text"].startswith("17 plus 25 is 42.")
    only = live.post(PATH, model="demo", prompt=tokens, **{**fields, "max_tokens": 0})["choices"][0]
    assert only["logprobs"]["token_logprobs"] == values[:-1]
    sampled = live.post(PATH, model="demo", prompt=tokens, **{**fields, "max_tokens": 3})["choices"][0]
    np.testing.assert_allclose(sampled["logprobs"]["token_logprobs"][1 : len(values)], values[1:], atol=1e-4)
    assert sampled["text"].startswith(choice["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": None},
        {"prompt": [1, "a"]},
        {"prompt": [[True]]},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"prompt": ""},
        {"prompt": ["a"] * 65},
        {"prompt": ["a", "b"], "stream": True},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "logprobs": 99},
        {"prompt": "a", "best_of": 4},
    ],
)
def test_a_wrong_completion_is_refused(live: Live, fields: dict[str, Any]) -> None:
    assert live.post(PATH, status=400, model="demo", **fields)["error"]["type"] == "invalid_request_error"


def test_the_tokenizer_is_described(live: Live) -> None:
    info = live.client.get("/tokenizer_info").json()
    assert info["eos_token"] in ("<|im_end|>", "<|endoftext|>")
    assert "<|im_start|>" in info["chat_template"]
    assert live.post("/tokenize", content="a b", with_pieces=True)["tokens"][0]["piece"] == "a"
