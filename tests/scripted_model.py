"""A model that says given texts: only the choice of tokens is scripted, everything else is real.

It needs the tokenizer of synthetic packs, whose token ids below 256 are bytes.
"""

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping

END_OF_TURN = 258
MARKUP = {"<think>": 259, "</think>": 260, "<tool_call>": 261, "</tool_call>": 262}
"""Tokens that are not bytes."""


def encode(text: str) -> Iterator[int]:
    """Yield the tokens of ``text``."""
    for part in re.split("(</?(?:think|tool_call)>)", text):
        yield from [MARKUP[part]] if part in MARKUP else part.encode()


def scripted_sampler(answers: Mapping[str, str]) -> type:
    """Return a class to replace ``Sampler``. Its answer is the one of ``answers`` whose word is the last in the prompt.

    Words that begin with "slow" delay each token.
    """

    class ScriptedSampler:
        can_choose_on_device = False

        def __init__(self, options: object, seed: object, prompt_ids: list[int], *rest: object) -> None:
            prompt = bytes(token for token in prompt_ids if token < 256).decode()
            word = max(answers, key=prompt.rfind)
            self._delay = 0.01 if word.startswith("slow") else 0.0
            self._tokens = deque([*encode(answers[word]), END_OF_TURN])

        def __call__(self, logits: object, *rest: object) -> int:
            time.sleep(self._delay)
            return self._tokens.popleft()

        def count(self, token: int) -> None:
            """Pass over a token that a constraint forces."""
            assert self._tokens.popleft() == token

        def return_number(self, number: object) -> None:
            """Do nothing."""

    return ScriptedSampler
