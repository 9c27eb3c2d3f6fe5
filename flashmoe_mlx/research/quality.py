"""Measure the quality of a model's answers: held-out perplexity, distance from a reference run, and exact answers.

Every scored token goes through the decode path, where routing and caches matter, one at a time. Only the prompt of a
chat is prefilled, as in normal use. Compare settings of one model on the same items: perplexities of different
tokenizers cannot be compared.

    items = load_items(shipped_items())
    with load("packs/x", experts_k=10) as engine, Reference.record(engine, items) as reference:
        with load("packs/x", experts_k=4) as fewer:
            quality = evaluate(fewer, items, reference)
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompting import render_prompt
from flashmoe_mlx.paths import name_in_errors
from flashmoe_mlx.research.intervals import ratio_interval, share_interval
from flashmoe_mlx.research.items import Answer, Item, judge

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of its items that are done, and the number of all."""
_MOST_ANSWER_TOKENS = 256
_ANSWER_ROOM = 16
"""Tokens by which an answer may exceed one and a half times the length of the expected answer."""
_THINKING_ROOM = 2048
"""Tokens of thinking before an answer, for a model whose template refuses to switch it off."""


@dataclass(frozen=True)
class Passage:
    """Tokens of an item: ``given`` are prefilled, ``scored`` are decoded one by one."""

    given: list[int]
    scored: list[int]


def passage(engine: Engine, item: Item) -> Passage:
    """Tokenize an item for this model; a text's first token is given, since nothing predicts it."""
    tokenizer = engine.tokenizer
    if item.text is not None:
        ids = tokenizer.encode(item.text)
        return Passage(ids[:1], ids[1:])
    # The end of the turn is a token too, but the template rather than the model determines it.
    return Passage(tokenizer.encode(_prompt(engine, item)), tokenizer.encode(item.answer))


def _prompt(engine: Engine, item: Item) -> str:
    """Render an item's messages with thinking off, or with the template's default where that is not possible."""
    template = engine.tokenizer.chat_template
    if template is None:
        raise InputError(
            "this model has no chat template: only items with a text can be scored (kinds=[text])",
            code="no_chat_template",
        )
    thinking = None if _refusal(engine, item) else False
    return render_prompt(item.messages, template, tools=item.tools or None, enable_thinking=thinking)


def _refusal(engine: Engine, item: Item) -> str | None:
    """Return the reason why ``item`` cannot be rendered with thinking off, if it can be with thinking.

    Qwen3.8's template, for example, says "Disabling thinking is not supported."
    """
    template = engine.tokenizer.chat_template
    if template is None or not item.messages:
        return None
    try:
        render_prompt(item.messages, template, tools=item.tools or None, enable_thinking=False)
    except InputError as error:
        render_prompt(item.messages, template, tools=item.tools or None)  # raises where thinking is not the reason
        return str(error)
    return None


def log_probabilities(engine: Engine, tokens: Passage) -> Iterator[Floats]:
    """Yield log-probabilities [vocabulary] for each scored token, in order; each but the first after a decode step.

    A passage without scored tokens yields nothing.

    Raises:
        FlashMoeError: the model's logits are NaN or +inf; code "bad_logits".
    """
    if not tokens.scored:
        return
    cache = engine.new_cache()
    logits = engine.forward(tokens.given, cache)[-1]
    for index, token in enumerate(tokens.scored):
        yield _log_softmax(logits)
        if index + 1 < len(tokens.scored):
            logits = engine.forward([token], cache)[-1]


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    result: Floats = shifted - np.log(np.exp(shifted).sum())
    return result


class Reference:
    """Log-probabilities of a reference run over items, in a temporary file that ``close`` deletes.

    Each token takes one f32 for every entry of the vocabulary: 8 KB for the demo model, 1 MB for Qwen3.5.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str], values: npt.NDArray[np.float32], setup: Any) -> None:
        self._folder = folder
        self.values = values
        """f32 [scored tokens of all items, vocabulary]."""
        self.setup = setup
        """The settings of the reference run, as in ``Engine.setup``."""

    @classmethod
    def record(cls, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> "Reference":
        """Run ``engine`` over ``items``.

        Raises:
            InputError: no item has a token to score; code "nothing_to_score".
        """
        passages = [passage(engine, item) for item in items]
        total = sum(len(one.scored) for one in passages)
        if not total:
            raise InputError("no item has a token to score: its text or answer is too short", code="nothing_to_score")
        folder = tempfile.TemporaryDirectory(prefix="flashmoe-reference-")
        shape = (total, engine.model.config.vocab_size)
        path = Path(folder.name) / "log_probabilities.f32"
        try:
            with name_in_errors(path):
                values = np.memmap(path, np.float32, "w+", shape=shape)
            row = 0
            for index, one in enumerate(passages):
                if progress:
                    progress("reference", index, len(passages))
                for distribution in log_probabilities(engine, one):
                    values[row] = distribution
                    row += 1
        except BaseException:
            folder.cleanup()
            raise
        return cls(folder, values, engine.setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file; may be called again."""
        self.values = np.empty((0, 0), np.float32)
        self._folder.cleanup()


@dataclass
class _Scores:
    """Sums over the scored tokens of each item."""

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """The results of ``evaluate``; ``summary`` has the figures."""

    summary: dict[str, Any]
    answers: list[Answer]


def evaluate(
    engine: Engine,
    items: Sequence[Item],
    reference: Reference | None = None,
    *,
    generate: bool = True,
    progress: Progress | None = None,
) -> Quality:
    """Score ``engine`` on ``items``; with ``generate``, also let it answer greedily and judge the answers.

    The summary holds: ``thinking``, whether thinking was off, as it is wherever the chat template allows that; ``text``
    and ``answers`` (the right answers) with ``perplexity``, ``bits_per_token`` and, against a ``reference`` over the
    same items, ``kl`` (nats per token, of this run from the reference) and ``top1_agreement``; ``kinds`` with the share
    of right answers of each kind; ``questions`` (items judged by their words), ``json_parsed``, ``json_valid``,
    ``json_exact`` and ``tool_calls``. Shares have 95 % intervals (Wilson), means have intervals from a bootstrap over
    items.

    Raises:
        InputError: the reference was recorded over other items or with another vocabulary.
    """
    scores = {"text": _Scores(), "answers": _Scores()}
    passages = [passage(engine, item) for item in items]
    if reference is not None:
        expected = (sum(len(one.scored) for one in passages), engine.model.config.vocab_size)
        if reference.values.shape != expected:
            raise InputError(
                "the reference was recorded over other items, or by a model with another vocabulary",
                code="another_reference",
            )
    row = 0
    for index, (item, one) in enumerate(zip(items, passages, strict=True)):
        if progress:
            progress("tokens", index, len(items))
        if one.scored:
            rows = None if reference is None else reference.values[row : row + len(one.scored)]
            _score(engine, one, rows, scores["answers" if item.text is None else "text"])
            row += len(one.scored)
    judged = [item for item in items if item.judged] if generate else []
    answers = []
    for index, item in enumerate(judged):
        if progress:
            progress("answers", index, len(judged))
        answers.append(judge(item, answer(engine, item)))
    summary: dict[str, Any] = {name: _figures(one, reference is not None) for name, one in scores.items() if one.tokens}
    refusal = next((reason for item in items if (reason := _refusal(engine, item))), None)
    thinking = "off" if refusal is None else f"the template's default, as it refuses to switch it off ({refusal})"
    return Quality({"thinking": thinking, **summary, **_shares(answers)}, answers)


def _score(engine: Engine, tokens: Passage, rows: Floats | None, scores: _Scores) -> None:
    loss = divergence = 0.0
    agreed = 0
    for index, (token, own) in enumerate(zip(tokens.scored, log_probabilities(engine, tokens), strict=True)):
        loss -= float(own[token])
        if rows is not None:
            theirs = rows[index]
            possible = theirs > -np.inf  # an impossible token adds nothing: p log p is 0 there
            terms = np.exp(theirs[possible]) * (theirs[possible] - own[possible])
            divergence += float(np.sum(terms, dtype=np.float64))
            agreed += int(own.argmax() == theirs.argmax())
    scores.loss.append(loss)
    scores.tokens.append(len(tokens.scored))
    scores.divergence.append(divergence)
    scores.agreed.append(agreed)


def _figures(scores: _Scores, compared: bool) -> dict[str, Any]:
    tokens = sum(scores.tokens)
    mean = sum(scores.loss) / tokens
    bounds = ratio_interval(scores.loss, scores.tokens)
    found: dict[str, Any] = {
        "items": len(scores.tokens),
        "tokens": tokens,
        "perplexity": _exp(mean),
        "perplexity_interval": None if bounds is None else [_exp(bound) for bound in bounds],
        "bits_per_token": mean / math.log(2),
    }
    if compared:
        found |= {
            "kl": sum(scores.divergence) / tokens,
            "kl_interval": ratio_interval(scores.divergence, scores.tokens),
            "top1_agreement": sum(scores.agreed) / tokens,
            "top1_agreement_interval": ratio_interval(scores.agreed, scores.tokens),
        }
    return found


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def answer(engine: Engine, item: Item) -> str:
    """Let the model answer greedily; returns the answer without the thinking that may precede it."""
    expected = len(engine.tokenizer.encode(item.answer))
    room = min(_MOST_ANSWER_TOKENS, expected + expected // 2 + _ANSWER_ROOM)
    thinks = _refusal(engine, item) is not None
    pieces = engine.generate(
        item.messages,
        tools=item.tools or None,
        enable_thinking=None if thinks else False,
        max_tokens=room + _THINKING_ROOM if thinks else room,
        temperature=0,
    )
    return "".join(piece.text for piece in pieces).strip()


def _shares(answers: Sequence[Answer]) -> dict[str, Any]:
    kinds = dict.fromkeys(one.item.kind for one in answers)
    found: dict[str, Any] = {}
    if kinds:
        found["kinds"] = {kind: _share([one.right for one in answers if one.item.kind == kind]) for kind in kinds}
    of_json = [one for one in answers if one.item.schema is not None]
    for name, verdicts in (
        ("questions", [one.right for one in answers if one.item.exact is not None]),
        ("json_parsed", [bool(one.parsed) for one in of_json]),
        ("json_valid", [bool(one.valid) for one in of_json]),
        ("json_exact", [one.right for one in of_json]),
        ("tool_calls", [one.right for one in answers if one.item.call is not None]),
    ):
        if verdicts:
            found[name] = _share(verdicts)
    return found


def _share(verdicts: Sequence[bool]) -> dict[str, Any]:
    right = sum(verdicts)
    return {
        "right": right,
        "of": len(verdicts),
        "share": right / len(verdicts),
        "interval": share_interval(right, len(verdicts)),
    }
