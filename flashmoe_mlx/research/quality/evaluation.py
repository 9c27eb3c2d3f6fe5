"""Measure the quality of a model: held-out perplexity, distance from a reference run, and exact answers.

Every scored token goes through the decode path, where routing and caches matter, one token at a time. Only the prompt
of a chat is prefilled, as in normal use. Compare configurations of one model on the same items; perplexities of models
with different tokenizers cannot be compared.

    items = load_items(shipped_items())
    with load("packs/x", experts_k=10) as engine, Reference.record(engine, items) as reference:
        with load("packs/x", experts_k=4) as fewer:
            quality = evaluate(fewer, items, reference)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashmoe_mlx.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.research.intervals import ratio_interval, share_interval
from flashmoe_mlx.research.quality.answering import Attempt, attempt
from flashmoe_mlx.research.quality.items import Answer, Item
from flashmoe_mlx.research.quality.passages import Floats, Passage, log_probabilities, passage, thinking_refusal
from flashmoe_mlx.research.quality.reference import Progress, Reference


@dataclass
class _Scores:
    """Sums over the scored tokens of each item: negative log-likelihood, counts, divergence and agreements."""

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """The results of ``evaluate``: the ``summary`` that it describes, and the judged answers."""

    summary: dict[str, Any]
    answers: list[Answer]


def evaluate(
    engine: Engine,
    items: Sequence[Item],
    reference: Reference | None = None,
    *,
    generate: bool = True,
    constraints: bool = False,
    progress: Progress | None = None,
) -> Quality:
    """Score ``engine`` on ``items``.

    The summary holds:

    - ``thinking``: "off", or the reason why the chat template did not allow thinking to be switched off.
    - ``text`` and ``answers`` (the expected answers): ``perplexity``, ``bits_per_token`` and, with a reference, ``kl``
      (KL divergence of this run from the reference, nats per token) and ``top1_agreement``.
    - ``kinds``: the share of correct answers for each kind of item.
    - ``questions`` (items with ``exact``), ``json_parsed``, ``json_valid``, ``json_exact``, ``tool_calls``: shares.
    - ``constraints``: for items with a schema or a call, ``without`` and ``with`` constraints, the same shares, and the
      ``tokens``, ``forwards`` (passes through the model) and ``seconds`` of all answers.

    Shares have 95 % Wilson intervals. Means have 95 % intervals from a bootstrap over items.

    Args:
        engine: the model to score.
        items: texts and questions.
        reference: a reference run over the same items.
        generate: whether to let the model answer the questions greedily, and judge the answers.
        constraints: whether to let it answer items with a schema or a call once more, under constraints.
        progress: called before each item.

    Raises:
        InputError: the reference was recorded over different items or with another vocabulary (code
            "another_reference").
    """
    scores = {"text": _Scores(), "answers": _Scores()}
    passages = [passage(engine, item) for item in items]
    if reference is not None:
        expected = (sum(len(tokens.scored) for tokens in passages), engine.model.config.vocab_size)
        if reference.values.shape != expected:
            raise InputError(
                "the reference was recorded over different items, or by a model with a different vocabulary",
                code="another_reference",
            )
    row = 0
    for index, (item, tokens) in enumerate(zip(items, passages, strict=True)):
        if progress:
            progress("tokens", index, len(items))
        if tokens.scored:
            rows = None if reference is None else reference.values[row : row + len(tokens.scored)]
            _score(engine, tokens, rows, scores["answers" if item.text is None else "text"])
            row += len(tokens.scored)
    judged = [item for item in items if item.judged] if generate else []
    free = _attempts(engine, judged, "answers", progress)
    answers = [done.answer for done in free]
    summary: dict[str, Any] = {
        name: _statistics(sums, reference is not None) for name, sums in scores.items() if sums.tokens
    }
    refusal = next((reason for item in items if (reason := thinking_refusal(engine, item))), None)
    thinking = "off" if refusal is None else f"the template's default, because it cannot be switched off ({refusal})"
    summary = {"thinking": thinking, **summary, **_shares(answers)}
    if constraints and any(item.constrainable for item in judged):
        formed = [done for done in free if done.answer.item.constrainable]
        constrained = _attempts(
            engine, [done.answer.item for done in formed], "constrained answers", progress, constrained=True
        )
        summary["constraints"] = {"without": _forms(formed), "with": _forms(constrained)}
    return Quality(summary, answers)


def _attempts(
    engine: Engine, items: Sequence[Item], activity: str, progress: Progress | None, *, constrained: bool = False
) -> list[Attempt]:
    attempts = []
    for index, item in enumerate(items):
        if progress:
            progress(activity, index, len(items))
        attempts.append(attempt(engine, item, constrained=constrained))
    return attempts


def _forms(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the shares of correct answers, and what all answers together took."""
    return {
        **_shares([done.answer for done in attempts]),
        "tokens": sum(done.tokens for done in attempts),
        "forwards": sum(done.forwards for done in attempts),
        "seconds": sum(done.seconds for done in attempts),
    }


def _score(engine: Engine, tokens: Passage, rows: Floats | None, scores: _Scores) -> None:
    """Add the sums over ``tokens`` to ``scores``; ``rows`` are the log-probabilities of the reference run, if any."""
    loss = divergence = 0.0
    agreed = 0
    for index, (token, predicted) in enumerate(zip(tokens.scored, log_probabilities(engine, tokens), strict=True)):
        loss -= float(predicted[token])
        if rows is not None:
            expected = rows[index]
            possible = expected > -np.inf  # p log p is 0 for impossible tokens
            terms = np.exp(expected[possible]) * (expected[possible] - predicted[possible])
            divergence += float(np.sum(terms, dtype=np.float64))
            agreed += int(predicted.argmax() == expected.argmax())
    scores.loss.append(loss)
    scores.tokens.append(len(tokens.scored))
    scores.divergence.append(divergence)
    scores.agreed.append(agreed)


def _statistics(scores: _Scores, compared: bool) -> dict[str, Any]:
    """Return means over tokens with their intervals; the distances from a reference only if ``compared``."""
    tokens = sum(scores.tokens)
    mean = sum(scores.loss) / tokens
    bounds = ratio_interval(scores.loss, scores.tokens)
    statistics: dict[str, Any] = {
        "items": len(scores.tokens),
        "tokens": tokens,
        "perplexity": _exp(mean),
        "perplexity_interval": None if bounds is None else [_exp(bound) for bound in bounds],
        "bits_per_token": mean / math.log(2),
    }
    if compared:
        statistics |= {
            "kl": sum(scores.divergence) / tokens,
            "kl_interval": ratio_interval(scores.divergence, scores.tokens),
            "top1_agreement": sum(scores.agreed) / tokens,
            "top1_agreement_interval": ratio_interval(scores.agreed, scores.tokens),
        }
    return statistics


def _exp(value: float) -> float:
    """Return e ** ``value``; infinity on overflow."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _shares(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the shares of correct answers, by kind and by criterion."""
    kinds = dict.fromkeys(answer.item.kind for answer in answers)
    shares: dict[str, Any] = {}
    if kinds:
        shares["kinds"] = {
            kind: _share([answer.correct for answer in answers if answer.item.kind == kind]) for kind in kinds
        }
    json_answers = [answer for answer in answers if answer.item.schema is not None]
    for name, verdicts in (
        ("questions", [answer.correct for answer in answers if answer.item.exact is not None]),
        ("json_parsed", [bool(answer.parsed) for answer in json_answers]),
        ("json_valid", [bool(answer.valid) for answer in json_answers]),
        ("json_exact", [answer.correct for answer in json_answers]),
        ("tool_calls", [answer.correct for answer in answers if answer.item.call is not None]),
    ):
        if verdicts:
            shares[name] = _share(verdicts)
    return shares


def _share(verdicts: Sequence[bool]) -> dict[str, Any]:
    """Return the share of true ``verdicts`` with its interval, in the form of ``evaluate.json``."""
    right = sum(verdicts)
    return {
        "right": right,
        "of": len(verdicts),
        "share": right / len(verdicts),
        "interval": share_interval(right, len(verdicts)),
    }
