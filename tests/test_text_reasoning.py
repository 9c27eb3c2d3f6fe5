"""Separating thinking from the answer, token by token."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.made_models.byte_tokenizer import write_byte_tokenizer
from flashmoe_mlx.text.reasoning import ReasoningSplitter
from flashmoe_mlx.text.tokenizer import Tokenizer

THINKING = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
CALL = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def by_id(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("by_id")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def by_text(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return the byte tokenizer without tokens for the tags."""
    folder = tmp_path_factory.mktemp("by_text")
    write_byte_tokenizer(folder)
    path = folder / "tokenizer.json"
    published = json.loads(path.read_text())
    published["added_tokens"] = [token for token in published["added_tokens"] if token["special"]]
    path.write_text(json.dumps(published))
    return Tokenizer.load(folder)


@pytest.fixture(params=["by_id", "by_text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    requested: Tokenizer = request.getfixturevalue(request.param)
    return requested


def split(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> tuple[str, str]:
    """Return reasoning and content of the output, decoded token by token as in the engine."""
    splitter, detokenizer = ReasoningSplitter(tokenizer, tokenizer.encode(prompt)), tokenizer.detokenizer()
    pieces = [splitter.add(token_id, detokenizer.add(token_id)) for token_id in ids]
    pieces += [splitter.add(-1, detokenizer.flush()), splitter.finish()]
    return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)


@pytest.mark.parametrize(
    ("prompt", "output", "reasoning", "content"),
    [
        # The form of the published templates; either the prompt or the model opens thinking.
        (THINKING, "why\nso\n</think>\n\nBecause.\n", "why\nso", "Because.\n"),
        ("", "<think>\nwhy\n</think>\n\nBecause.", "why", "Because."),
        ("", "\n<think>why</think>Because.", "why", "Because."),
        (THINKING, "\n</think>\n\nBecause.", "", "Because."),
        ("<think>", "\nwhy\n\n</think>Because.", "why", "Because."),
        # Thinking begins in the prompt.
        (THINKING + "I", "\nsee\n</think>\n\nBecause.", "\nsee", "Because."),
        # No thinking.
        (CLOSED, "Because.", "", "Because."),
        (CLOSED, "\n Because. \n", "", "\n Because. \n"),
        ("Once", " upon\n\na time", "", " upon\n\na time"),
        ("", "", "", ""),
        # A tag in the message of the user does not open thinking, because a special token ends the turn.
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "Hi", "", "Hi"),
        # The output ends at the token limit; no text is lost.
        (THINKING, "why\n\n", "why\n\n", ""),
        (THINKING, "why</thi", "why</thi", ""),
        ("", " \n", "", " \n"),
        ("", "<thi", "", "<thi"),
        # Repeated and stray tags.
        (THINKING, "<think>\nwhy\n</think>\n\nBecause.", "why", "Because."),
        (THINKING, "a <think> tag\n</think>\n\nBecause.", "a <think> tag", "Because."),
        (THINKING, "a</think>\n</think>\n\nBecause.", "a", "Because."),
        (THINKING, "a</think>\n\n<think>\nb</think>\n\nBecause.", "ab", "Because."),
        (CLOSED, "</think>\n\nBecause.", "", "Because."),
        (CLOSED, "Because of <think> and </think>.", "", "Because of <think> and </think>."),
        (THINKING, "a</think>\n\nBecause of <think> and </think>.", "a", "Because of <think> and </think>."),
        # Calls: in the answer, as a draft, mentioned, and at the end of thinking that is not closed.
        (THINKING, f"a\n</think>\n\n{CALL}", "a", CALL),
        (CLOSED, CALL, "", CALL),
        (THINKING, f"a\n{CALL}\n</think>\n\n{CALL}", f"a\n{CALL}", CALL),
        (THINKING, f"a\n{CALL}\nNo.\n</think>\n\nOk", f"a\n{CALL}\nNo.", "Ok"),
        (THINKING, f"a\n\n{CALL}", "a", CALL),
        (THINKING, f"{CALL}\n{CALL}\n", "", f"{CALL}\n{CALL}\n"),
        (THINKING, f"{CALL}\n<tool_call>", "", f"{CALL}\n<tool_call>"),
        (THINKING, f"a\n\n{CALL[:40]}", "a", CALL[:40]),
        (THINKING, "the `<tool_call>` tag\n</think>\n\nOk", "the `<tool_call>` tag", "Ok"),
        (THINKING, "the <tool_call> <tool_call>\n", "the <tool_call> <tool_call>\n", ""),
        (THINKING, f"<tool_call>\n{CALL}", "<tool_call>", CALL),
        # A character cut off by the tag.
        (THINKING, "wh\ufffd</think>\n\n\ufffd", "wh\ufffd", "\ufffd"),
    ],
)
def test_reasoning_and_content(tokenizer: Tokenizer, prompt: str, output: str, reasoning: str, content: str) -> None:
    assert split(tokenizer, prompt, tokenizer.encode(output)) == (reasoning, content)


def test_a_quoted_tag_is_text_if_the_tag_is_a_token(by_id: Tokenizer) -> None:
    quoted = [*b"of </think>\n"]
    assert split(by_id, THINKING, [*quoted, by_id.added_tokens["</think>"], *b"\n\n<think>"]) == (
        "of </think>",
        "<think>",
    )


def test_an_incomplete_character_before_a_tag(by_id: Tokenizer) -> None:
    assert split(by_id, THINKING, [0xE2, by_id.added_tokens["</think>"], 65]) == ("\ufffd", "A")


def test_open_while_thinking(tokenizer: Tokenizer) -> None:
    splitter = ReasoningSplitter(tokenizer, tokenizer.encode(THINKING))
    detokenizer = tokenizer.detokenizer()
    assert splitter.open
    for token_id in tokenizer.encode("why</think>"):
        assert splitter.open
        splitter.add(token_id, detokenizer.add(token_id))
    assert not splitter.open
    assert not ReasoningSplitter(tokenizer, tokenizer.encode(CLOSED)).open
    assert not ReasoningSplitter(tokenizer, []).open


def test_text_is_returned_immediately(by_text: Tokenizer) -> None:
    splitter = ReasoningSplitter(by_text, by_text.encode(THINKING))
    assert splitter.add(0, "a") == ("a", "")
    assert splitter.add(0, "\n\n") == ("", "")
    assert splitter.add(0, "b<") == ("\n\nb", "")
    assert splitter.add(0, "/b") == ("</b", "")
    assert splitter.add(0, "</think>\n") == ("", "")
    assert splitter.add(0, "c\n") == ("", "c\n")
    assert splitter.finish() == ("", "")


def test_a_missing_end_tag_takes_linear_time(by_text: Tokenizer) -> None:
    splitter = ReasoningSplitter(by_text, by_text.encode(THINKING))
    pieces = [splitter.add(0, text) for text in [*("\n", "<") * 20_000, "<tool_call>", *("\n",) * 20_000]]
    pieces.append(splitter.finish())
    reasoning, content = ("".join(column) for column in zip(*pieces, strict=True))
    assert (reasoning.replace("\n", ""), content) == ("<" * 20_000 + "<tool_call>", "")


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
texts = st.lists(
    st.sampled_from(
        [*"<>/\n a", "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "think", "tool_call>"]
    )
    | st.text(st.characters(codec="utf-8"), max_size=3),
    max_size=25,
).map("".join)


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 100)), st.sampled_from(["", THINKING, CLOSED, "<think>a"]))
def test_results_do_not_depend_on_the_split(by_text: Tokenizer, text: str, cuts: list[int], prompt: str) -> None:
    whole = ReasoningSplitter(by_text, by_text.encode(prompt))
    first, rest = whole.add(-1, text), whole.finish()
    splitter = ReasoningSplitter(by_text, by_text.encode(prompt))
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [splitter.add(-1, text[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    pieces.append(splitter.finish())
    assert ["".join(column) for column in zip(*pieces, strict=True)] == [
        a + b for a, b in zip(first, rest, strict=True)
    ]


@settings(deadline=None)
@given(texts, st.sampled_from(["", THINKING, CLOSED, "<think>a"]))
def test_tags_as_tokens_and_as_text_agree(by_id: Tokenizer, by_text: Tokenizer, text: str, prompt: str) -> None:
    assert split(by_id, prompt, by_id.encode(text)) == split(by_text, prompt, by_text.encode(text))
