"""Separation of a model's thinking, ``<think>...</think>``, from its answer, token by token.

Rules, the same for tags that are tokens and tags that are text:

- Thinking is open from the start where the prompt ends inside an open ``<think>``: its last tag after the last special
  token (which ends a turn) is ``<think>``. Otherwise the model opens it, before any other text but whitespace.
- The first ``</think>`` ends thinking. A further ``<think>`` before any text of the answer opens it again.
- Newlines next to a tag are markup, as the published templates write and strip them.
- A ``<think>`` at the start of open thinking, and a ``</think>`` before the answer, repeat what is known: dropped.
  All other tags are text, so that an answer that quotes them stays whole.
- A tool call written inside thinking is a draft and belongs to the reasoning, unless the output ends with it and
  thinking was never closed: then the model meant the call, and it belongs to the answer.
"""

from collections.abc import Sequence
from enum import Enum, auto

from flashmoe_mlx.text.tags import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tokenizer import Tokenizer

_FUNCTION = "<function="


class _State(Enum):
    START = auto()
    """No answer yet; whitespace is held back, as ``<think>`` may follow."""
    OPENED = auto()
    """Thinking, no text of it yet."""
    THINKING = auto()
    CALL_TAG = auto()
    """In thinking, after ``<tool_call>``."""
    CALL_BODY = auto()
    """In thinking, after ``<tool_call> <function=``."""
    CALL_ENDED = auto()
    """In thinking, after ``</tool_call>``."""
    ANSWER = auto()


_CALL_STATES = (_State.CALL_TAG, _State.CALL_BODY, _State.CALL_ENDED)


class ReasoningSplitter:
    """Splits the tokens generated after ``prompt_ids`` into reasoning and content.

    The pieces returned by ``add`` and ``finish``, joined, do not depend on where the text is cut into pieces. Text is
    held back only while it may still turn out to be markup.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._scanner = TagScanner(tokenizer.added_tokens)
        self._state = _initial_state(tokenizer, prompt_ids)
        self._closed = False
        """A ``</think>`` came, so that newlines before the answer are markup."""
        self._held: list[Segment] = []
        """Whitespace at the start, newlines that may precede ``</think>``, or a call in thinking."""
        self._call = ""
        """The text after ``<tool_call>`` in thinking, as long as it may become ``<function=``."""
        self._reasoning: list[str] = []
        self._content: list[Segment] = []

    @property
    def open(self) -> bool:
        """Whether the model is thinking now."""
        return self._state not in (_State.START, _State.ANSWER)

    def add(self, token_id: int, text: str) -> tuple[str, str]:
        """Take a token and the text that the detokenizer gave for it; returns new reasoning and new content."""
        return _joined(self.split(token_id, text))

    def finish(self) -> tuple[str, str]:
        """End the output; returns the reasoning and the content that were held back."""
        return _joined(self.split_rest())

    def split(self, token_id: int, text: str) -> tuple[str, list[Segment]]:
        """Do the same as ``add``, with the content as segments, for a reader of tool calls."""
        for segment in self._scanner.add(token_id, text):
            self._take(segment)
        return self._taken()

    def split_rest(self) -> tuple[str, list[Segment]]:
        """Do the same as ``finish``, with the content as segments."""
        for segment in self._scanner.finish():
            self._take(segment)
        held, self._held = self._held, []
        if self._state is _State.CALL_BODY or any(segment.tag == END_TOOL_CALL for segment in held):
            first = next(index for index, segment in enumerate(held) if segment.tag == TOOL_CALL)
            self._content += held[first:]
            self._state = _State.ANSWER
        elif self._state is _State.START:
            self._answer(held)
        else:
            self._reasoning += [segment.text for segment in held]
        return self._taken()

    def _taken(self) -> tuple[str, list[Segment]]:
        reasoning, content = "".join(self._reasoning), self._content
        self._reasoning, self._content = [], []
        return reasoning, content

    def _take(self, segment: Segment) -> None:
        if self._state is _State.ANSWER:
            self._content.append(segment)
        elif self._state is _State.START:
            self._take_at_start(segment)
        elif segment.tag == END_THINK:
            self._close()
        elif self._state in _CALL_STATES:
            self._take_in_call(segment)
        elif segment.tag == TOOL_CALL:
            self._begin_call(segment)
        elif not (self._state is _State.OPENED and segment.tag == THINK):
            self._think(segment.text)

    def _take_at_start(self, segment: Segment) -> None:
        if segment.tag == THINK:
            self._held = []
            self._state = _State.OPENED
        elif segment.tag == END_THINK:
            self._held = []
            self._closed = True
        else:
            self._held.append(segment)
            if segment.tag or segment.text.strip():
                held, self._held = self._held, []
                self._answer(held)
                self._state = _State.ANSWER

    def _answer(self, segments: list[Segment]) -> None:
        """Begin the answer, without the newlines that follow ``</think>``."""
        for segment in segments:
            text = segment.text.lstrip("\n") if self._closed else segment.text
            if text or segment.tag:
                self._closed = False
                self._content.append(Segment(text, segment.tag))

    def _think(self, text: str) -> None:
        """Take text of the reasoning; newlines at its end are held back."""
        if self._state is _State.OPENED:
            text = text.lstrip("\n")
        if not text:
            return
        self._state = _State.THINKING
        body = text.rstrip("\n")
        if body:
            self._reasoning += [*(segment.text for segment in self._held), body]
            self._held = []
        if len(body) < len(text):
            self._held.append(Segment(text[len(body) :]))

    def _close(self) -> None:
        if self._state in _CALL_STATES:
            self._draft()
        self._held = []
        self._closed = True
        self._state = _State.START

    def _begin_call(self, segment: Segment) -> None:
        self._held.append(segment)
        self._call = ""
        self._state = _State.CALL_TAG

    def _draft(self) -> None:
        """Make reasoning of a call that was held back."""
        held, self._held = self._held, []
        self._state = _State.THINKING
        for segment in held:
            self._think(segment.text)

    def _take_in_call(self, segment: Segment) -> None:
        ended = self._state is _State.CALL_ENDED
        if segment.tag == TOOL_CALL:
            if self._state is _State.CALL_TAG:
                self._draft()
            if self._state is _State.CALL_BODY:
                self._held.append(segment)
            else:
                self._begin_call(segment)
        elif self._state is _State.CALL_BODY:
            self._held.append(segment)
            if segment.tag == END_TOOL_CALL:
                self._state = _State.CALL_ENDED
        elif ended and not segment.tag and not segment.text.strip():
            self._held.append(segment)
        elif ended:
            self._draft()
            self._take(segment)
        else:
            self._held.append(segment)
            self._call = (self._call + segment.text).lstrip()
            if self._call.startswith(_FUNCTION):
                self._state = _State.CALL_BODY
            elif not _FUNCTION.startswith(self._call):
                self._draft()


def _initial_state(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> _State:
    start = next((end for end in range(len(prompt_ids), 0, -1) if prompt_ids[end - 1] in tokenizer.special_ids), 0)
    scanner = TagScanner(tokenizer.added_tokens, (THINK, END_THINK))
    detokenizer = tokenizer.detokenizer()
    state = _State.START
    segments = [item for token in prompt_ids[start:] for item in scanner.add(token, detokenizer.add(token))]
    for segment in [*segments, *scanner.add(None, detokenizer.flush()), *scanner.finish()]:
        if segment.tag:
            state = _State.OPENED if segment.tag == THINK else _State.START
        elif state is _State.OPENED and segment.text.strip("\n"):
            state = _State.THINKING
    return state


def _joined(taken: tuple[str, list[Segment]]) -> tuple[str, str]:
    return taken[0], "".join(segment.text for segment in taken[1])
