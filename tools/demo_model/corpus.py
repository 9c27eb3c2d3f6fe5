"""The corpus of the demo model: an endless stream of documents from a seed, and a held-out set.

python tools/demo_model/corpus.py            # print an example of each kind
"""

from collections.abc import Callable, Iterator
from random import Random

from documents import Document, segments
from questions import (
    all_facts,
    careless,
    context_question,
    person_facts,
    recall,
    reworded,
    small_talk,
    sum_question,
    village_facts,
    world_question,
)
from stories import notice, portrait, story, tell_about
from structured import json_request, tool_use
from world import World

HELD_OUT = {"text": 40, "world": 60, "context": 60, "arithmetic": 40, "recall": 40, "json": 80, "tool_call": 80,
            "tool_result": 40}  # fmt: skip
"""Number of documents of each kind in the held-out set."""


SHARES = {
    "portrait": 0.07,
    "story": 0.06,
    "notice": 0.03,
    "world": 0.16,
    "context": 0.17,
    "sum": 0.11,
    "recall": 0.06,
    "json": 0.14,
    "tool": 0.14,
    "small talk": 0.03,
    "tell": 0.03,
    "interview": 0.0,
}
"""Shares of the generators among the documents from which the held-out set is drawn."""
TRAINING = {
    "portrait": 0.06,
    "story": 0.05,
    "notice": 0.02,
    "world": 0.16,
    "context": 0.13,
    "sum": 0.11,
    "recall": 0.09,
    "json": 0.10,
    "tool": 0.10,
    "small talk": 0.02,
    "tell": 0.02,
    "interview": 0.14,
}
"""Shares of the generators among the training documents; difficult kinds are more frequent."""


class Corpus:
    """Documents about one world. ``held_out`` is drawn first; training documents contain none of its sentences."""

    def __init__(self, seed: int = 0) -> None:
        self.world = world = World(seed)
        self._seed = seed
        facts = all_facts(world)
        subjects = [person_facts(p) for p in world.people] + [village_facts(v) for v in world.villages]
        makers: dict[str, Callable[[Random], Document]] = {
            "portrait": lambda draw: portrait(draw, subjects),
            "story": story,
            "notice": notice,
            "world": lambda draw: world_question(draw, facts),
            "context": context_question,
            "sum": sum_question,
            "recall": lambda draw: recall(draw, facts),
            "json": json_request,
            "tool": tool_use,
            "small talk": small_talk,
            "tell": lambda draw: tell_about(draw, world),
            "interview": lambda draw: context_question(draw, (4, 5, 6, 7)),
        }
        # The held-out set must not depend on the shares of the training documents.
        self._makers = [(SHARES[name], make) for name, make in makers.items()]
        self.held_out = self._draw_held_out()
        self._makers = [(TRAINING[name], make) for name, make in makers.items()]
        self._reserved = {sentence for document in self.held_out for sentence in document.sentences}

    def _draw_held_out(self) -> list[Document]:
        draw = Random(f"held out {self._seed}")
        wanted, documents = dict(HELD_OUT), []
        seen: set[str] = set()
        while any(wanted.values()):
            document = self._document(draw)
            if wanted.get(document.kind, 0) and not document.sentences <= seen:
                wanted[document.kind] -= 1
                seen |= document.sentences
                documents.append(document)
        return sorted(documents, key=lambda document: list(HELD_OUT).index(document.kind))

    def _document(self, draw: Random) -> Document:
        shares, makers = zip(*self._makers, strict=True)
        (maker,) = draw.choices(makers, shares)
        return maker(draw)

    def training(self, shard: int, count: int) -> Iterator[Document]:
        """Yield the ``count`` documents of ``shard``, the same for each call."""
        draw = Random(f"training {self._seed} {shard}")
        while count:
            document = self._document(draw)
            reworded(draw, document)
            if document.sentences & self._reserved:
                continue
            careless(draw, document)
            yield document
            count -= 1


def _show() -> None:
    corpus = Corpus()
    shown: set[str] = set()
    for document in corpus.training(0, 400):
        if document.kind not in shown:
            shown.add(document.kind)
            print(f"--- {document.kind}\n" + "".join(text for text, _ in segments(document)))


if __name__ == "__main__":
    _show()
