"""A chat: a conversation, its settings and tools, and the model that answers."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from flashmoe_mlx.chat.answers import Answer, generate_answer
from flashmoe_mlx.chat.conversation import Conversation
from flashmoe_mlx.chat.engines import Engines
from flashmoe_mlx.chat.input import Consent, Input
from flashmoe_mlx.chat.screen import Screen
from flashmoe_mlx.chat.settings import Settings
from flashmoe_mlx.chat.status import Status
from flashmoe_mlx.chat.tools.toolbox import INTERRUPTED, Tool, Toolbox, ToolCallError, clean_result
from flashmoe_mlx.errors import FlashMoeError

_LONGEST_RESULT = 16384
"""The largest number of characters of a tool's result; at most one for each token of the context is kept, too."""
_SHOWN_LINES = 12
"""Number of lines of a result that are shown; the model gets all of them."""


class Chat:
    """A chat.

    Args:
        engines: the model.
        conversation: the conversation so far.
        settings: settings of the answers.
        toolbox: tools that the model may call.
        most_calls: the largest number of answers with calls to one question.
        screen: the output.
        input: the input, which asks for consent.
        on_change: called after each change of the conversation, to keep it on disk.

    Attributes:
        latest: the latest answer; None before the first one.
        answers: the measurements of all answers, for JSON.
        failed: the number of questions that an error left without an answer.
    """

    def __init__(
        self,
        *,
        engines: Engines,
        conversation: Conversation,
        settings: Settings,
        toolbox: Toolbox,
        most_calls: int,
        screen: Screen,
        input: Input,  # noqa: A002  # the name of the attribute
        on_change: Callable[[Conversation], None],
    ) -> None:
        self.engines = engines
        self.conversation: Conversation = conversation
        self.settings = settings
        self.toolbox = toolbox
        self.screen = screen
        self.input = input
        self.latest: Answer | None = None
        self.answers: list[Mapping[str, Any]] = []
        self.failed: int = 0
        self._most_calls = most_calls
        self._on_change = on_change

    @property
    def status(self) -> Status | None:
        """The figures of the latest answer; None before the first one."""
        return None if self.latest is None else self.latest.status

    def ask(self, question: str) -> bool:
        """Answer ``question``; return whether it joined the conversation.

        It does not if an error or an interrupt came before any part of an answer.

        Raises:
            KeyboardInterrupt: the user interrupted an answer to a question from a file; what arrived is kept.
        """
        before = len(self.conversation.turns)
        self.conversation.add_user(question)
        interrupted = False
        try:
            interrupted = self._answer_and_call()
        except FlashMoeError as error:
            self.report(error)
            self.failed += 1
        except KeyboardInterrupt:
            interrupted = True
        joined = len(self.conversation.turns) > before + 1
        if not joined:
            del self.conversation.turns[before:]
        self._on_change(self.conversation)
        if interrupted and not self.input.interactive:
            raise KeyboardInterrupt
        return joined

    def ask_again(self, question: str) -> bool:
        """Replace the latest question and its answer; return whether the new one joined, as ``ask`` does.

        If it did not, the conversation is unchanged.
        """
        before = list(self.conversation.turns)
        self.conversation.take_question()
        joined = False
        try:
            joined = self.ask(question)
        finally:
            if not joined:
                self.conversation.turns = before
                self._on_change(self.conversation)
        return joined

    def begin(self, conversation: Conversation) -> None:
        """Continue with another conversation."""
        self.conversation = conversation
        self._on_change(conversation)

    def report(self, error: FlashMoeError) -> None:
        """Show an error, with a remedy that a chat has."""
        hints = {"prompt_too_long": "; /clear begins a new conversation, and /edit changes the last question"}
        self.screen.note(f"error: {error}{hints.get(error.code, '')}")

    def changed(self) -> None:
        """Keep the conversation on disk after a command changed it."""
        self._on_change(self.conversation)

    def _answer_and_call(self) -> bool:
        """Generate answers and run the tools that they call; return whether the user interrupted."""
        for left in range(self._most_calls, -1, -1):
            answer = self._next_answer()
            if answer.interrupted or answer.error is not None or not answer.calls:
                return answer.interrupted
            if self._run_calls(answer, left):
                return True
            if not left:
                self.screen.note(f"stopped: tools were called {self._most_calls} times in a row (tools.most_calls)")
        return False

    def _next_answer(self) -> Answer:
        engine = self.engines.current
        view = self.screen.answer(self.settings.folded)
        try:
            answer = generate_answer(
                engine, self.conversation.messages, self.toolbox.declarations, self.settings.arguments(), view
            )
        except BaseException:
            view.close()
            raise
        self.latest = answer
        self.answers.append(answer.stats)
        stopped = answer.interrupted or answer.error is not None
        if not answer.empty:
            calls = [] if stopped else answer.calls
            self.conversation.add_answer(answer.text, answer.reasoning, calls)
            self._on_change(self.conversation)
        if answer.error is not None:
            raise answer.error
        self._explain(answer)
        return answer

    def _explain(self, answer: Answer) -> None:
        """Show why an answer is not complete."""
        if answer.interrupted:
            self.screen.note("stopped" if answer.empty else "stopped; the conversation keeps this part")
        elif answer.finish_reason == "length":
            status = answer.status
            full = status is not None and status.context >= status.max_context
            remedy = "the context is full; /clear" if full else "max_tokens is reached; /set max_tokens=... allows more"
            self.screen.note(f"the answer is cut off: {remedy}")
        elif answer.thinking and not answer.text:
            self.screen.note("the model ended while it was thinking; /thinking off skips thinking")

    def _run_calls(self, answer: Answer, left: int) -> bool:
        """Run the calls of an answer; add their results to the conversation; return whether the user interrupted.

        Every call gets a result, because templates expect one.
        """
        interrupted = False
        for call, message in zip(answer.calls, self.conversation.turns[-1]["tool_calls"], strict=True):
            result = "not run: the user interrupted an earlier call"
            if not left:
                result = "not run: too many calls in a row; answer without calls"
            elif not call.complete:
                result = "not run: the call is incomplete"
            elif not interrupted:
                try:
                    result = self._run_call(call.name, call.arguments)
                except KeyboardInterrupt:
                    interrupted = True
                    result = INTERRUPTED
                    self.screen.note("stopped")
            self.conversation.add_result(message["id"], result)
        self._on_change(self.conversation)
        return interrupted

    def _run_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        tool = self.toolbox.tools.get(name)
        self.screen.note(shown_call(name, arguments, tool))
        if tool is None:
            return f"error: there is no tool {name!r}; the tools are {', '.join(self.toolbox.tools)}"
        if name not in self.toolbox.allowed:
            consent = self.input.consent()
            if consent is Consent.NO:
                self.screen.note(f"{name} did not run")
                return "not run: the user refused this call"
            if consent is Consent.ALWAYS:
                self.toolbox.allowed.add(name)
        try:
            result = tool.run(arguments)
        except ToolCallError as failure:
            result = f"error: {failure}"
        limit = min(_LONGEST_RESULT, self.engines.current.model.config.max_context)
        result = clean_result(result, limit)
        lines = result.splitlines()
        more = len(lines) - _SHOWN_LINES
        self.screen.quote("\n".join([*lines[:_SHOWN_LINES], *([f"[{more} more lines]"] if more > 0 else [])]))
        return result


def shown_call(name: str, arguments: Mapping[str, Any], tool: Tool | None) -> str:
    """Return the lines that show a call completely, with the origin of the tool."""
    lines = [f"call of {name} ({'unknown' if tool is None else tool.origin})"]
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *rest = text.split("\n")
        lines += [f"  {key}: {first}", *(f"  {'':{len(key)}}  {line}" for line in rest)]
    return "\n".join(lines)
