"""The record of a chat in the folder of its run: every conversation, after each change."""

from pathlib import Path

from flashmoe_mlx.chat.conversation import Conversation


class Record:
    """The conversations of a chat, each in its own file: ``conversation.json``, ``conversation-2.json`` and so on.

    The files are those of ``/save``, so that ``/load`` reads them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._latest: tuple[Conversation, Path] | None = None

    def save(self, conversation: Conversation) -> None:
        """Write ``conversation``; a new one gets a file that does not exist yet."""
        if self._latest is None or self._latest[0] is not conversation:
            self._latest = conversation, self._unused()
        conversation.save(self._latest[1])

    def _unused(self) -> Path:
        path, number = self._folder / "conversation.json", 1
        while path.exists():
            number += 1
            path = self._folder / f"conversation-{number}.json"
        return path
