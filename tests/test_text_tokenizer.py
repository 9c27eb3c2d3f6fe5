"""Tokenizer, detokenizer and the byte tokenizer of synthetic models, compared with ``tokenizers`` and Python."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats import untrusted
from flashmoe_mlx.made_models.byte_tokenizer import write_byte_tokenizer
from flashmoe_mlx.text import tokenizer as tokenizer_module
from flashmoe_mlx.text.tokenizer import Detokenizer, Tokenizer

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
MARKUP = {
    "<think>": 259,
    "</think>": 260,
    "<tool_call>": 261,
    "</tool_call>": 262,
    "<tool_response>": 263,
    "</tool_response>": 264,
}
VOCAB_SIZE = 265
UNKNOWN = VOCAB_SIZE + 1000
# Tokens of several bytes that begin and end inside characters, as merged tokens may.
SPLIT_TOKENS = [
    b"\x80\xe2",
    b"a\xe2",
    b"\xe2\x82",
    b"\x82\xac",
    b"\xf0\x9f",
    b"\x98\x80!",
    b"\xff\xff",
    b"\xef\xbf\xbd",
]

pieces_of_text = st.lists(st.text(max_size=8) | st.sampled_from([*SPECIAL, *MARKUP])).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    assert write_byte_tokenizer(path) == VOCAB_SIZE
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def library(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def merging(folder: Path) -> tokenizers.Tokenizer:
    """Return the byte tokenizer with SPLIT_TOKENS from id VOCAB_SIZE on."""
    published = json.loads((folder / "tokenizer.json").read_text())
    symbols = list(published["model"]["vocab"])
    for index, token in enumerate(SPLIT_TOKENS):
        published["model"]["vocab"]["".join(symbols[byte] for byte in token)] = VOCAB_SIZE + index
    return tokenizers.Tokenizer.from_str(json.dumps(published))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def stream(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()])


# The byte tokenizer


def test_byte_tokenizer_files_are_reproducible(folder: Path, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_library_writes_the_same_byte_tokenizer(folder: Path, library: tokenizers.Tokenizer) -> None:
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(library.to_str())


def test_byte_symbols_equal_those_of_the_library(library: tokenizers.Tokenizer) -> None:
    symbols = {library.id_to_token(byte) for byte in range(256)}
    assert symbols == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_special_flags_equal_those_of_qwen(library: tokenizers.Tokenizer) -> None:
    added = library.get_added_tokens_decoder()
    assert {token.content: token_id for token_id, token in added.items() if token.special} == SPECIAL
    assert {token.content: token_id for token_id, token in added.items() if not token.special} == MARKUP


# Encoding and decoding


@given(st.text(st.characters(codec="utf-8", exclude_characters="<")))
def test_text_is_encoded_as_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == list(text.encode())


@given(pieces_of_text)
def test_encode_recognizes_special_tokens_and_adds_none(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_encode_of_a_rendered_chat(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\né<|im_end|>\n<think>")
    assert ids == [257, *b"user\n", 0xC3, 0xA9, 258, 10, 259]


def test_decode_skips_special_tokens_but_not_markup(tokenizer: Tokenizer) -> None:
    ids = [257, 259, 65, 260, 258, UNKNOWN]
    assert tokenizer.decode(ids) == "<|im_start|><think>A</think><|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>A</think>"


@given(st.binary())
def test_decode_replaces_invalid_bytes_like_python(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")


def test_vocab_size_includes_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_a_prompt_is_never_truncated_or_padded(model: Path) -> None:
    edit(
        model / "tokenizer.json",
        lambda published: published.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            padding={
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        ),
    )
    assert Tokenizer.load(model).encode("abc") == [97, 98, 99]


def test_a_lone_surrogate_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as raised:
        tokenizer.encode("a\ud800")
    assert raised.value.code == "invalid_text"
    assert "position 1" in str(raised.value)


def test_a_panic_of_the_library_is_an_input_error(model: Path) -> None:
    def chunks_of_nothing(published: dict[str, Any]) -> None:
        published["pre_tokenizer"] = {"type": "FixedLength", "length": 0}

    edit(model / "tokenizer.json", chunks_of_nothing)
    broken = Tokenizer.load(model)
    with pytest.raises(InputError) as raised:
        broken.encode("abc")
    assert raised.value.code == "invalid_text"


# The detokenizer


@given(st.lists(st.integers(0, UNKNOWN)))
@example([0xE2, 258, 0x82, UNKNOWN, 0xAC])
@example([0xE2, 0x82])
@example([0xF0, 0x9F, 0x98, 65, 0x80])
def test_pieces_equal_the_decoded_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert stream(tokenizer.detokenizer(), ids) == tokenizer.decode(ids, skip_special_tokens=True)


# Few different bytes, so that valid characters, invalid bytes and long runs of invalid bytes are likely.
@given(
    st.lists(st.sampled_from([65, 0x80, 0x82, 0xAC, 0xE2, 0xF0, 0x9F, 0xFF, 258, *range(265, 265 + len(SPLIT_TOKENS))]))
)
@example([0xE2] + [265] * 20 + [0x82, 0xAC])
@example([272, 272, 65])
def test_pieces_equal_the_decoded_text_if_tokens_split_characters(
    merging: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert stream(Detokenizer(merging), ids) == merging.decode(ids, skip_special_tokens=True)


@given(st.text().filter(lambda text: "\ufffd" not in text))
def test_characters_are_returned_when_complete(tokenizer: Tokenizer, text: str) -> None:
    detokenizer, data, decoded = tokenizer.detokenizer(), text.encode(), ""
    for end, byte in enumerate(data, start=1):
        decoded += detokenizer.add(byte)
        assert decoded == data[:end].decode(errors="ignore")
    assert detokenizer.flush() == ""


def test_an_incomplete_character_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(byte) for byte in "€".encode()] == ["", "", "€"]
    assert detokenizer.add(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"


def test_flush_starts_a_new_stream(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    detokenizer.add(0xE2)
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert [detokenizer.add(byte) for byte in b"\x82a"] == ["", "\ufffda"]


@pytest.mark.parametrize("run", [[0xFF], [0xE2, 0x80], [0xF0, 0x9F, 0x98]])
def test_a_run_of_invalid_bytes_is_returned_early(tokenizer: Tokenizer, run: list[int]) -> None:
    detokenizer = tokenizer.detokenizer()
    early = "".join(detokenizer.add(byte) for byte in run * 100)
    assert len(early) > 90
    assert early + detokenizer.flush() == "\ufffd" * 100


def test_leading_spaces_of_a_metaspace_tokenizer() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    library.decoder = tokenizers.decoders.Metaspace()
    detokenizer = Detokenizer(library)
    assert [detokenizer.add(token_id) for token_id in (0, 1, 1)] == ["a", " b", " b"]
    assert detokenizer.flush() == ""


# End-of-text ids


def test_eos_of_the_byte_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == {256, 258}


def test_eos_ids_are_the_union_of_all_files(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    (model / "config.json").write_text('{"eos_token_id": [2, null, 3], "text_config": {"eos_token_id": 4}}')
    edit(model / "tokenizer_config.json", lambda config: config.update(eos_token={"content": "<|endoftext|>"}))
    assert Tokenizer.load(model).eos_token_ids == {1, 2, 3, 4, 256}


def test_absent_eos_is_ignored(model: Path) -> None:
    (model / "generation_config.json").unlink()
    (model / "config.json").write_text('{"eos_token_id": null, "text_config": null}')
    edit(model / "tokenizer_config.json", lambda config: config.update(eos_token="<not in the vocabulary>"))
    assert Tokenizer.load(model).eos_token_ids == frozenset()


@pytest.mark.parametrize("eos", ["x", 1.0, True, -1, 2**32, {"a": 1}, [1, "x"], [[1]]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_malformed_eos_ids_are_refused(model: Path, name: str, eos: object) -> None:
    (model / name).write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "invalid_eos_token"
    assert name in str(raised.value)


@pytest.mark.parametrize("eos", [5, ["<|im_end|>"], {"text": "<|im_end|>"}])
def test_a_malformed_eos_token_is_refused(model: Path, eos: object) -> None:
    edit(model / "tokenizer_config.json", lambda config: config.update(eos_token=eos))
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "invalid_eos_token"
    assert "tokenizer_config.json" in str(raised.value)


def test_a_malformed_text_config_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"text_config": [1]}')
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "invalid_config"
    assert "text_config" in str(raised.value)


# Hostile files


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        Tokenizer.load(tmp_path)
    assert raised.value.code == "no_tokenizer"
    assert "tokenizer.json" in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"model": {"type": "BPE"}',
        b"\xff\xfe",
        b"[" * 100_000,
        # The library panics on this file.
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}',
    ],
)
def test_corrupt_tokenizers_are_refused(model: Path, data: bytes) -> None:
    (model / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "invalid_tokenizer"
    assert "tokenizer.json" in str(raised.value)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff{}", "not UTF-8"),
    ],
)
def test_other_corrupt_files_are_refused(model: Path, name: str, data: bytes, reason: str) -> None:
    (model / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} .*{reason}"):
        Tokenizer.load(model)


def test_oversized_files_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(untrusted.read_object.__kwdefaults__, "limit", 50)
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "file_too_large"
    assert "config.json" in str(raised.value)
    monkeypatch.setattr(tokenizer_module, "_LARGEST_TOKENIZER", 1000)
    with pytest.raises(InputError) as raised:
        Tokenizer.load(model)
    assert raised.value.code == "file_too_large"
    assert "tokenizer.json" in str(raised.value)


def test_directories_and_pipes_are_refused(model: Path) -> None:
    (model / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json is not a regular file"):
        Tokenizer.load(model)
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a regular file"):
        Tokenizer.load(model)


def test_a_model_without_a_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert Tokenizer.load(model).chat_template is None
