"""Batches for training. Worker processes generate and tokenize shards of the corpus; the seed determines the order."""

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
"""Lengths of rows. Each document has a separate row, padded to the next length, so that documents cannot interact."""
_SHARD = 2000

Ids = npt.NDArray[np.uint16]
PADDING, GIVEN, OWN = 0, 1, 2
"""Roles of a token: padding, part of the prompt, written by the model."""


def encode_document(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the token ids of a document and the role of each token."""
    ids: list[int] = []
    roles: list[int] = []
    for text, own in segments(document):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        roles += [OWN if own else GIVEN] * len(piece)
    return ids, roles


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of one length: ids and roles, [B, L]."""

    ids: npt.NDArray[np.int64]
    roles: npt.NDArray[np.uint8]


def pad_rows(rows: list[tuple[Any, Any]], length: int) -> Batch:
    """Return rows of ids and roles, padded to ``length``."""
    ids, roles = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.uint8)
    for row, (own_ids, own_roles) in enumerate(rows):
        ids[row, : len(own_ids)] = own_ids
        roles[row, : len(own_roles)] = own_roles
    return Batch(ids, roles)


def _work(corpus: Corpus, tokenizer_json: str, shard: int, workers: int, out: Any) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    while True:
        documents = [encode_document(document, tokenizer) for document in corpus.training(shard, _SHARD)]
        ids = np.concatenate([np.array(ids, np.uint16) for ids, _ in documents])
        roles = np.concatenate([np.array(roles, np.uint8) for _, roles in documents])
        out.put((ids, roles, np.cumsum([len(ids) for ids, _ in documents])))
        shard += workers


class Stream:
    """An endless stream of training steps.

    A step is a list of batches, one for each length, with as many rows as correspond to the corpus.
    """

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
        """Return the number of rows of each length in a step."""
        sample = [len(encode_document(document, tokenizer)[0]) for document in corpus.training(-2, 4000)]
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
                    step.append(pad_rows(waiting[place][:count], LENGTHS[place]))
                    del waiting[place][:count]
                self._ready.put(step)

    def next(self) -> list[Batch]:
        """Return the batches of the next step."""
        return self._ready.get()

    def close(self) -> None:
        """Stop the worker processes."""
        for process in self._processes:
            process.terminate()
