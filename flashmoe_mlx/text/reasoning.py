"""Separate a model's thinking, ``<think>...</think>``, from its answer, token by token.

The rules are the same for tags that are tokens and tags that are text:

- Thinking is open from the start if the last tag of the prompt, after its last special token, is ``<think>``. (A
  special token ends a turn.) Otherwise the model opens thinking, and only whitespace may precede ``<think>``.
- The first ``</think>`` ends thinking. A further ``<think>`` before any text of the answer opens it again.
- Newlines next to a tag are markup, since the published templates write and strip them.
- A redundant ``<think>`` at the start of open thinking, and a redundant ``</think>`` before the answer, are dropped.
  All other tags are text, so that an answer may quote them.
- A tool call inside thinking is a draft, which belongs to the reasoning. If the output ends after the call and thinking
  was never closed, the call was meant, and it belongs to the answer.
"""

from collections.abc import Sequence
from enum import Enum, auto

from flashmoe_mlx.text.tags import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL, Segment, TagScanner
from flashmoe_mlx.text.tokenizer import Tokenizer

_FUNCTION = "<function="


class _State(Enum):
    START = auto()
    """Before the answer; whitespace is held back because ``<think>`` may follow."""
    OPENED = auto()
    """Thinking without text so far."""
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
    """A splitter of the tokens generated after ``prompt_ids`` into reasoning and content.

    The concatenated pieces do not depend on how the text is divided into tokens. Text is held back only while it may be
    markup.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._scanner = TagScanner(tokenizer.added_tokens)
        self._state = _initial_state(tokenizer, prompt_ids)
        self._closed = False
        """Whether newlines are markup because ``</think>`` preceded."""
        self._held: list[Segment] = []
        """Whitespace at the start, newlines that may precede ``</think>``, or a tool call in thinking."""
        self._call = ""
        """The text after ``<tool_call>`` in thinking while it may be the beginning of ``<function=``."""
        self._reasoning: list[str] = []
        self._content: list[Segment] = []

    @property
    def open(self) -> bool:
        """Whether thinking is open."""
        return self._state not in (_State.START, _State.ANSWER)

    def add(self, token_id: int, text: str) -> tuple[str, str]:
        """Add a token and the text that it completed; return new reasoning and new content."""
        return _join_content(self.split(token_id, text))

    def finish(self) -> tuple[str, str]:
        """End the output; return the reasoning and the content that were held back."""
        return _join_content(self.split_rest())

    def split(self, token_id: int, text: str) -> tuple[str, list[Segment]]:
        """Add a token like ``add``, but return the content as segments, for a reader of tool calls."""
        for segment in self._scanner.add(token_id, text):
            self._read(segment)
        return self._flush()

    def split_rest(self) -> tuple[str, list[Segment]]:
        """End the output like ``finish``, but return the content as segments."""
        for segment in self._scanner.finish():
            self._read(segment)
        held, self._held = self._held, []
        if self._state is _State.CALL_BODY or any(segment.tag == END_TOOL_CALL for segment in held):
            first = next(index for index, segment in enumerate(held) if segment.tag == TOOL_CALL)
            self._content += held[first:]
            self._state = _State.ANSWER
        elif self._state is _State.START:
            self._answer(held)
        else:
            self._reasoning += [segment.text for segment in held]
        return self._flush()

    def _flush(self) -> tuple[str, list[Segment]]:
        reasoning, content = "".join(self._reasoning), self._content
        self._reasoning, self._content = [], []
        return reasoning, content

    def _read(self, segment: Segment) -> None:
        if self._state is _State.ANSWER:
            self._content.append(segment)
        elif self._state is _State.START:
            self._read_at_start(segment)
        elif segment.tag == END_THINK:
            self._close()
        elif self._state in _CALL_STATES:
            self._read_in_call(segment)
        elif segment.tag == TOOL_CALL:
            self._begin_call(segment)
        elif not (self._state is _State.OPENED and segment.tag == THINK):
            self._think(segment.text)

    def _read_at_start(self, segment: Segment) -> None:
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
        """Begin the answer with ``segments``, without the newlines that follow ``</think>``."""
        for segment in segments:
            text = segment.text.lstrip("\n") if self._closed else segment.text
            if text or segment.tag:
                self._closed = False
                self._content.append(Segment(text, segment.tag))

    def _think(self, text: str) -> None:
        """Append text to the reasoning; hold back newlines at its end."""
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
        """End thinking."""
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
        """Turn a call that was held back into reasoning."""
        held, self._held = self._held, []
        self._state = _State.THINKING
        for segment in held:
            self._think(segment.text)

    def _read_in_call(self, segment: Segment) -> None:
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
            self._read(segment)
        else:
            self._held.append(segment)
            self._call = (self._call + segment.text).lstrip()
            if self._call.startswith(_FUNCTION):
                self._state = _State.CALL_BODY
            elif not _FUNCTION.startswith(self._call):
                self._draft()


def _initial_state(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> _State:
    """Return the state at the end of the prompt."""
    start = _turn_start(tokenizer, prompt_ids)
    scanner = TagScanner(tokenizer.added_tokens, (THINK, END_THINK))
    detokenizer = tokenizer.detokenizer()
    state = _State.START
    segments = [segment for token in prompt_ids[start:] for segment in scanner.add(token, detokenizer.add(token))]
    for segment in [*segments, *scanner.add(None, detokenizer.flush()), *scanner.finish()]:
        if segment.tag:
            state = _State.OPENED if segment.tag == THINK else _State.START
        elif state is _State.OPENED and segment.text.strip("\n"):
            state = _State.THINKING
    return state


def thinking_is_closed(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Tell whether the prompt ends after thinking, so that the model answers at once."""
    start = _turn_start(tokenizer, prompt_ids)
    return END_THINK in tokenizer.decode(list(prompt_ids[start:]))


def _turn_start(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> int:
    """Return the position after the last special token, which begins the last turn."""
    return next((end for end in range(len(prompt_ids), 0, -1) if prompt_ids[end - 1] in tokenizer.special_ids), 0)


def _join_content(pieces: tuple[str, list[Segment]]) -> tuple[str, str]:
    """Return the reasoning, and the text of the segments of the content."""
    reasoning, content = pieces
    return reasoning, "".join(segment.text for segment in content)
