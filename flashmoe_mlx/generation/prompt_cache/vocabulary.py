"""The parts of a tokenizer that a prompt cache needs: bytes of tokens, and the tokens that begin and end turns."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompt_cache.positions import Kind
from flashmoe_mlx.text.chat_template import ChatTemplate
from flashmoe_mlx.text.tags import THINK
from flashmoe_mlx.text.tokenizer import Tokenizer

_ADDED = b"\xff"
"""The first byte of a key of an added token; UTF-8 has no such byte, so text never equals an added token."""
_ROLE_TOKENS = 8
"""Tokens at the beginning of a turn that tell whether it holds the result of a tool."""


class Vocabulary:
    """Tokens as a prompt cache sees them.

    Attributes:
        header: the tokens that begin every answer, such as those of "<|im_start|>assistant\\n"; empty if the model has
            no chat template.
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.header: list[int] = _answer_header(tokenizer)
        self._added = frozenset(tokenizer.added_tokens.values())
        self._key = lru_cache(maxsize=2**16)(self._key_of_token)

    def key(self, token_ids: Sequence[int]) -> bytes:
        """Return the text of tokens as bytes, in which added tokens differ from their text."""
        return b"".join(map(self._key, token_ids))

    def key_size(self, token_id: int) -> int:
        """Return the number of bytes of the key of a token."""
        return len(self._key(token_id))

    def encode_key(self, key: bytes) -> list[int] | None:
        """Return tokens for a piece of a key; None if it holds an added token or a part of a character."""
        try:
            return self.tokenizer.encode(key.decode())
        except (UnicodeDecodeError, InputError):
            return None

    def answers(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return the positions of each answer in a prompt: after its header, and before the token that ends it.

        The last answer has not begun: it is the generation prompt.
        """
        header = self.header
        found = []
        for position in _positions(token_ids, header[0]) if header else []:
            start = position + len(header)
            if list(token_ids[position:start]) == header:
                ends = self.tokenizer.eos_token_ids
                end = next((at for at in range(start, len(token_ids)) if token_ids[at] in ends), len(token_ids))
                found.append((start, end))
        return found

    def boundaries(self, token_ids: Sequence[int]) -> dict[int, Kind]:
        """Return the positions in a prompt at which other prompts may diverge.

        These are the end of the tools and the system message, and the headers of answers to a user's messages: all
        that a template writes after one, thinking included, may differ in the next turn.
        """
        if not self.header:
            return {}
        turns = _positions(token_ids, self.header[0])
        chosen = {}
        if len(turns) > 2 and "system" in self._beginning(token_ids, turns[0]):
            chosen[turns[1]] = Kind.SYSTEM
        for before, turn in pairwise(turns):
            start = turn + len(self.header)
            if list(token_ids[turn:start]) == self.header and not self._holds_result(token_ids, before):
                chosen[start] = Kind.TURN
        return chosen

    def _holds_result(self, token_ids: Sequence[int], turn: int) -> bool:
        """Return whether a turn holds the result of a tool."""
        role, beginning = self.tokenizer.decode([token_ids[turn + 1]]), self._beginning(token_ids, turn)
        return role == "tool" or "<tool_response>" in beginning

    def _beginning(self, token_ids: Sequence[int], turn: int) -> str:
        return self.tokenizer.decode(list(token_ids[turn : turn + _ROLE_TOKENS]))

    def _key_of_token(self, token_id: int) -> bytes:
        if token_id in self._added:
            return _ADDED + token_id.to_bytes(4, "big")
        return self.tokenizer.token_bytes(token_id)


def _positions(token_ids: Sequence[int], token_id: int) -> list[int]:
    return [position for position, token in enumerate(token_ids) if token == token_id]


def _answer_header(tokenizer: Tokenizer) -> list[int]:
    template = tokenizer.chat_template
    if template is None:
        return []
    try:
        tokens = tokenizer.encode(_written_before_answers(template))
    except InputError:
        return []
    return tokens if tokens and tokens[0] in tokenizer.added_tokens.values() else []


def _written_before_answers(template: ChatTemplate) -> str:
    """Return what a template writes before an answer, up to the beginning of thinking."""
    messages = [{"role": "user", "content": "a"}]
    with_header = template.render(messages)
    return with_header.removeprefix(template.render(messages, add_generation_prompt=False)).split(THINK)[0]
