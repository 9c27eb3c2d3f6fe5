"""Conversion between text and tokens, defined by a model's ``tokenizer.json``."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.untrusted import read_file, read_object
from flashmoe_mlx.text.chat_template import ChatTemplate

_LARGEST_TOKENIZER = 256 * 2**20
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""The byte that each character of a byte-level vocabulary stands for; source: ``bytes_to_unicode`` of GPT-2."""
_LONGEST_CHARACTER = 4
"""Largest number of bytes, and therefore of tokens, of a UTF-8 character."""


class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        eos_token_ids: ids that end a text.
        chat_template: the published chat template, if any.
        added_tokens: ids of tokens outside the trained vocabulary, such as ``<think>``, by their text.
        special_ids: ids that separate turns and texts; ``decode`` can skip them.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, eos_token_ids: Iterable[int], chat_template: ChatTemplate | None
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids)
        self.chat_template = chat_template
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer files in ``folder``.

        Raises:
            InputError: ``tokenizer.json`` is missing (code "no_tokenizer"), or a file is malformed or too large.
        """
        path = folder / "tokenizer.json"
        data = read_file(path, _LARGEST_TOKENIZER)
        if data is None:
            raise InputError(f"{path} does not exist: the model has no tokenizer", code="no_tokenizer")
        with _library_errors(f"{path} is not a tokenizer", "invalid_tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # Settings for training, if left in the file, would truncate or pad prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, _published_eos(folder, tokenizer), ChatTemplate.load(folder))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added tokens included; the embedding of a model often has more rows."""
        return self._tokenizer.get_vocab_size()

    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``."""
        return self._tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. Special tokens in the text are recognized; no special tokens are added.

        Raises:
            InputError: the text is not valid Unicode, or the tokenizer has no tokens for it (code "invalid_text").
        """
        with _library_errors("the text cannot be tokenized", "invalid_text"):
            text.encode()  # the error for a lone surrogate names the character
            # Faster than ``encode``, which also keeps the lock of Python meanwhile.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return encoding.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character; none for an id outside the vocabulary."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        values = [_BYTE_OF.get(character) for character in token]
        return token.encode() if None in values else bytes(value for value in values if value is not None)

    def detokenizer(self) -> "Detokenizer":
        """Return an incremental decoder for one stream of ids."""
        return Detokenizer(self._tokenizer)


class Detokenizer:
    """An incremental decoder of ids, without special tokens.

    The concatenated pieces equal ``decode`` of all ids, provided that the tokenizer is byte-level, as those of the
    supported models are. ``tokenizers.DecodeStream`` is not used because it holds back runs of invalid bytes and of
    skipped tokens, and decodes the whole run again for every token.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._context: list[int] = []
        """The ids whose text was returned last. Some decoders treat the first token of a text differently."""
        self._context_text = ""
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """Add a token and return the text that is now complete; empty while a character is incomplete."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special:
            return ""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if not text.endswith("\ufffd"):
            return self._release(text, len(self._held))
        if len(self._held) > _LONGEST_CHARACTER:
            # The bytes are invalid. The text before the last token is complete if no character spans the boundary.
            preceding = self._decode(self._context + self._held[:-1])
            if preceding + self._decode(self._held[-1:]) == text:
                return self._release(preceding, len(self._held) - 1)
        return ""

    def flush(self) -> str:
        """End the stream and return the text that was held back. The decoder is then ready for a new stream."""
        piece = self._release(self._decode(self._context + self._held), len(self._held))
        self._context, self._context_text = [], ""
        return piece

    def _release(self, text: str, count: int) -> str:
        """Return the new part of ``text``, which is the text of the context and the first ``count`` held ids."""
        piece = text[len(self._context_text) :]
        self._context, self._held = self._held[:count], self._held[count:]
        self._context_text = self._decode(self._context)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def _library_errors(problem: str, code: str) -> Iterator[None]:
    """Convert errors of the ``tokenizers`` library to ``InputError``; its panics do not derive from ``Exception``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{problem}: {error}", code=code) from error


def _published_eos(folder: Path, tokenizer: tokenizers.Tokenizer) -> set[int]:
    """Return the union of all end-of-text ids in a model's files, whose lists may differ."""
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
                    f"{path}: eos_token_id contains {token_id!r}, which is not a token id", code="invalid_eos_token"
                )
            ids.add(token_id)

    path = folder / "tokenizer_config.json"
    token = read_object(path).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        raise InputError(f"{path}: eos_token is not the text of a token", code="invalid_eos_token")
    token_id = None if text is None else tokenizer.token_to_id(text)
    return ids if token_id is None else ids | {token_id}
