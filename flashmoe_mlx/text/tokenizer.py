"""Tokens and text, by a model's own ``tokenizer.json``."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.untrusted import read_file, read_object
from flashmoe_mlx.text.chat_template import ChatTemplate

_LARGEST_TOKENIZER = 256 * 2**20
_LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so the most tokens that one can be spread over."""


class Tokenizer:
    """A tokenizer, the ids that end a text, and the chat template published with it."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, eos_token_ids: Iterable[int], chat_template: ChatTemplate | None
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = chat_template
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        """Ids of the tokens outside the trained vocabulary, such as ``<think>``, by their text."""
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Ids that ``decode`` can skip: they separate turns and texts."""

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read a model's tokenizer files.

        Raises:
            InputError: ``tokenizer.json`` is missing, or a file is malformed or too large.
        """
        path = folder / "tokenizer.json"
        data = read_file(path, _LARGEST_TOKENIZER)
        if data is None:
            raise InputError(f"{path} does not exist: the model has no tokenizer", code="no_tokenizer")
        with _failures(f"{path} is not a tokenizer", "invalid_tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # A training set-up left in the file would cut prompts short.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, _published_eos(folder, tokenizer), ChatTemplate.load(folder))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's embedding is often padded to more rows."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, in which special tokens are recognized; none is added.

        Raises:
            InputError: the text is not valid Unicode, or the tokenizer has no tokens for it.
        """
        with _failures("the text cannot be tokenized", "invalid_text"):
            text.encode()  # names the character at fault where there are lone surrogates
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``; invalid UTF-8 becomes U+FFFD, and ids outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> "Detokenizer":
        """Return a decoder for one stream of ids."""
        return Detokenizer(self._tokenizer)


class Detokenizer:
    """Turns ids into text as they come, without special tokens; the pieces together equal ``decode`` of all the ids.

    That holds for byte-level tokenizers, which is what the supported models have. ``DecodeStream`` of ``tokenizers`` is
    not used: it holds back a run of invalid bytes or skipped tokens, and decodes all of it again at every token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._context: list[int] = []
        """The ids whose text was returned last: some decoders treat the first token of a text unlike the others."""
        self._context_text = ""
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """Return the text that ``token_id`` makes certain; empty while a character is incomplete."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special:
            return ""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if not text.endswith("\ufffd"):
            return self._give_out(text, len(self._held))
        if len(self._held) > _LONGEST_CHARACTER:
            # The text is broken already. What goes before the last token is certain if no character spans the two.
            before = self._decode(self._context + self._held[:-1])
            if before + self._decode(self._held[-1:]) == text:
                return self._give_out(before, len(self._held) - 1)
        return ""

    def flush(self) -> str:
        """End the stream and return the text that was held back; a new stream may begin."""
        piece = self._give_out(self._decode(self._context + self._held), len(self._held))
        self._context, self._context_text = [], ""
        return piece

    def _give_out(self, text: str, count: int) -> str:
        """Return the new part of ``text``, which belongs to the context and the first ``count`` held ids."""
        piece = text[len(self._context_text) :]
        self._context, self._held = self._held[:count], self._held[count:]
        self._context_text = self._decode(self._context)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _failures(what: str, code: str) -> Iterator[None]:
    """Turn all that the ``tokenizers`` library raises into an ``InputError``; its panics are no ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error}", code=code) from error


def _published_eos(folder: Path, tokenizer: tokenizers.Tokenizer) -> set[int]:
    """Return every end-of-text id in a model's files: their lists differ, and each id is meant to end a text."""
    generation, model = folder / "generation_config.json", folder / "config.json"
    model_config = read_object(model)
    text_config = model_config.get("text_config") or {}
    if not isinstance(text_config, dict):
        raise InputError(f"{model}: text_config is not an object", code="invalid_config")
    ids = set()
    for path, config in ((generation, read_object(generation)), (model, model_config), (model, text_config)):
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if type(token_id) is not int or not 0 <= token_id < 2**32:
                raise InputError(
                    f"{path}: eos_token_id holds {token_id!r}, which is not a token id", code="invalid_eos_token"
                )
            ids.add(token_id)

    path = folder / "tokenizer_config.json"
    token = read_object(path).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        raise InputError(f"{path}: eos_token is not a token", code="invalid_eos_token")
    token_id = None if text is None else tokenizer.token_to_id(text)
    return ids if token_id is None else ids | {token_id}
