"""Batches for training: worker processes write and tokenise shards of the corpus, in an order that the seed decides."""

import multiprocessing
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from corpus import Corpus
from documents import Document, segments
from tokenizers import Tokenizer

LENGTHS = (32, 64, 96, 160, 224, 288, 384)
"""A document is padded to the next of these and stands alone in its row: nothing leaks between documents."""
_SHARD = 2000

Ids = npt.NDArray[np.uint16]
PADDING, GIVEN, OWN = 0, 1, 2
"""Roles of a token: none, part of the prompt, written by the model."""


def encoded(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a document and the role of each."""
    ids: list[int] = []
    roles: list[int] = []
    for text, own in segments(document):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        roles += [OWN if own else GIVEN] * len(piece)
    return ids, roles


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one length: ids and roles [B, L]."""

    ids: npt.NDArray[np.int64]
    roles: npt.NDArray[np.uint8]


def padded(rows: list[tuple[Any, Any]], length: int) -> Batch:
    """Rows of ids and roles, filled up to ``length``."""
    ids, roles = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.uint8)
    for row, (own_ids, own_roles) in enumerate(rows):
        ids[row, : len(own_ids)] = own_ids
        roles[row, : len(own_roles)] = own_roles
    return Batch(ids, roles)


def _work(corpus: Corpus, tokenizer_json: str, shard: int, workers: int, out: Any) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    while True:
        documents = [encoded(document, tokenizer) for document in corpus.training(shard, _SHARD)]
        ids = np.concatenate([np.array(ids, np.uint16) for ids, _ in documents])
        roles = np.concatenate([np.array(roles, np.uint8) for _, roles in documents])
        out.put((ids, roles, np.cumsum([len(ids) for ids, _ in documents])))
        shard += workers


class Stream:
    """Steps without end; each is a list of batches, one a length, whose rows are as frequent as in the corpus."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, documents_per_step: int, workers: int) -> None:
        self.rows = self._rows(corpus, tokenizer, documents_per_step)
        context = multiprocessing.get_context("fork")
        self._queues = [context.Queue(2) for _ in range(workers)]
        self._processes = [
            context.Process(target=_work, args=(corpus, tokenizer.to_str(), w, workers, q), daemon=True)
            for w, q in enumerate(self._queues)
        ]
        for process in self._processes:
            process.start()
        self._ready: queue.Queue[list[Batch]] = queue.Queue(16)
        threading.Thread(target=self._fill, daemon=True).start()

    @staticmethod
    def _rows(corpus: Corpus, tokenizer: Tokenizer, documents_per_step: int) -> list[int]:
        """How many rows of each length a step has."""
        sample = [len(encoded(document, tokenizer)[0]) for document in corpus.training(-2, 4000)]
        counts = np.bincount(np.searchsorted(LENGTHS, sample), minlength=len(LENGTHS) + 1)[: len(LENGTHS)]
        return [max(1, round(documents_per_step * int(count) / len(sample))) for count in counts]

    def _shards(self) -> Iterator[tuple[Ids, npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
        while True:
            for source in self._queues:
                yield source.get()

    def _fill(self) -> None:
        waiting: list[list[tuple[Any, Any]]] = [[] for _ in LENGTHS]
        for ids, roles, ends in self._shards():
            start = 0
            for end in ends:
                place = int(np.searchsorted(LENGTHS, end - start))
                if place < len(LENGTHS):
                    waiting[place].append((ids[start:end], roles[start:end]))
                start = end
            while all(len(rows) >= count for rows, count in zip(waiting, self.rows, strict=True)):
                step = []
                for place, count in enumerate(self.rows):
                    step.append(padded(waiting[place][:count], LENGTHS[place]))
                    del waiting[place][:count]
                self._ready.put(step)

    def next(self) -> list[Batch]:
        """The batches of the next step."""
        return self._ready.get()

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.terminate()
