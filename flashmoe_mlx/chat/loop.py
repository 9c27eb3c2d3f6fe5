"""The loop of a chat: read a question or a command, answer it."""

import sys

from flashmoe_mlx.chat.commands import Outcome, run_command
from flashmoe_mlx.chat.input import quiet_keyboard
from flashmoe_mlx.chat.session import Chat
from flashmoe_mlx.console.output import counted
from flashmoe_mlx.errors import FlashMoeError


def run_chat(chat: Chat) -> None:
    """Answer questions and carry out commands until the input ends.

    Raises:
        KeyboardInterrupt: an answer to a question from a file was interrupted.
        FlashMoeError: the input is a file, and questions or commands in it failed; code "chat_failed".
    """
    with quiet_keyboard(sys.stdin):
        _Loop(chat).run()


class _Loop:
    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._default = ""
        """Text that the user may edit."""
        self._replaces = False
        """Whether the next question replaces the latest one."""
        self._failed = 0

    def run(self) -> None:
        chat = self._chat
        while True:
            try:
                text = chat.input.question(self._default)
            except EOFError:
                break
            except KeyboardInterrupt:
                self._default, self._replaces = "", False
                chat.screen.note("Ctrl-D or /quit ends the chat")
                continue
            if text.strip() and not self._take(text):
                break
        failed = self._failed + chat.failed
        if failed and not chat.input.interactive:
            raise FlashMoeError(f"{counted(failed, 'line')} of stdin failed; see the errors above", code="chat_failed")

    def _take(self, text: str) -> bool:
        """Answer or carry out ``text``; return whether the chat goes on."""
        chat = self._chat
        replaces, self._replaces, self._default = self._replaces, False, ""
        try:
            if text.startswith("/") and not text.startswith("//"):
                outcome = run_command(chat, text)
                if outcome is Outcome.EDIT:
                    self._default, self._replaces = chat.conversation.latest_question or "", True
                return outcome is not Outcome.QUIT
            question = text.removeprefix("/") if text.startswith("//") else text
            if not (chat.ask_again(question) if replaces else chat.ask(question)):
                self._default, self._replaces = text, replaces
        except KeyboardInterrupt:  # for instance while a backend is opened
            if not chat.input.interactive:
                raise
            chat.screen.note("stopped")
        except FlashMoeError as error:
            self._failed += 1
            chat.report(error)
        return True
