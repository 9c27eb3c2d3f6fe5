"""Measure the quality of a model's answers: held-out perplexity, distance from a reference run, and exact answers.

Every scored token goes through the decode path, where routing and caches matter, one at a time. Only the prompt of a
chat is prefilled, as in normal use. Compare settings of one model on the same items: perplexities of different
tokenizers cannot be compared.

    items = load_items(shipped_items())
    with load("packs/x", experts_k=10) as engine, Reference.record(engine, items) as reference:
        with load("packs/x", experts_k=4) as fewer:
            quality = evaluate(fewer, items, reference)

An item is an object of a JSON Lines file. With ``text`` it is a plain text, of which perplexity is measured. Otherwise
``messages`` (and ``tools``) ask for something, ``answer`` is what a right answer looks like, and at most one of these
says how it is judged: ``exact`` (the words themselves), ``schema`` with ``json`` (JSON that satisfies the schema; equal
to that value), ``call`` (one tool call, ``name`` and ``arguments``).
"""

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flashmoe_mlx.engine.engine import Engine
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.paths import name_in_errors
from flashmoe_mlx.research.intervals import ratio_interval, share_interval
from flashmoe_mlx.text.tool_calls import parse_tool_calls
from flashmoe_mlx.untrusted import read_text

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Called with what is done, how many items of it, and of how many."""
_LARGEST_ITEMS = 64 * 2**20
_MOST_ANSWER_TOKENS = 256
_ANSWER_ROOM = 16
"""Tokens by which an answer may exceed one and a half times the length of the expected answer."""
_THINKING_ROOM = 2048
"""Tokens of thinking before an answer, for a model whose template refuses to switch it off."""


@dataclass(frozen=True)
class Item:
    """Something to ask, or a text to read; see the module's docstring."""

    kind: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: str = ""
    exact: str | None = None
    schema: Mapping[str, Any] | None = None
    json: Any = None
    call: Mapping[str, Any] | None = None

    @property
    def judged(self) -> bool:
        """Whether an answer can be right or wrong."""
        return self.exact is not None or self.schema is not None or self.call is not None


def shipped_items() -> Path:
    """The held-out set of the demo model, which comes with the package."""
    return Path(str(package_files("flashmoe_mlx").joinpath("demo_model", "held_out.jsonl")))


def load_items(path: Path, kinds: Sequence[str] | None = None, limit: int | None = None) -> list[Item]:
    """Items of a JSON Lines file: of these kinds alone, and the first ``limit`` of each kind.

    Raises:
        InputError: there is no such file, a line is not an item, or nothing is left.
    """
    text = read_text(path, _LARGEST_ITEMS)
    if text is None:
        raise InputError(f"{path}: no such file")
    items = [_item(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    present = sorted({item.kind for item in items})
    for kind in kinds or ():
        if kind not in present:
            raise InputError(f"{path}: no items of kind {kind}; it has {', '.join(present)}")
    chosen: list[Item] = []
    counts: dict[str, int] = {}
    for item in items:
        counts[item.kind] = counts.get(item.kind, 0) + 1
        if (kinds is None or item.kind in kinds) and (limit is None or counts[item.kind] <= limit):
            chosen.append(item)
    if not chosen:
        raise InputError(f"{path}: no items")
    return chosen


_FIELDS = {
    "kind": str,
    "text": str,
    "messages": list,
    "tools": list,
    "answer": str,
    "exact": str,
    "schema": dict,
    "call": dict,
}


def _jsonschema() -> ModuleType:
    """Import the package that checks answers against schemas; it comes with the extra ``evaluate``."""
    try:
        return importlib.import_module("jsonschema")
    except ImportError:
        raise InputError(
            "items with a schema need the package jsonschema: pip install 'jsonschema>=4.23'",
            code="missing_package",
        ) from None


def _item(line: str, where: str) -> Item:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise InputError(f"{where}: not an object with a kind")
    for name, value in values.items():
        if name != "json" and (name not in _FIELDS or not isinstance(value, _FIELDS[name])):
            raise InputError(f"{where}: {name} is not known, or not of the right type")
    if ("text" in values) == ("messages" in values) or ("messages" in values) != ("answer" in values):
        raise InputError(f"{where}: give text, or messages with an answer")
    if "schema" in values:
        jsonschema = _jsonschema()
        try:
            jsonschema.Draft202012Validator.check_schema(values["schema"])
        except jsonschema.SchemaError as error:
            raise InputError(f"{where}: schema: {error.message}") from error
    for name in ("messages", "tools"):
        values[name] = tuple(values.get(name, ()))
    return Item(**values)


@dataclass(frozen=True)
class Passage:
    """Tokens of an item: ``given`` are prefilled, ``scored`` are decoded one by one."""

    given: list[int]
    scored: list[int]


def passage(engine: Engine, item: Item) -> Passage:
    """The tokens of an item for this model's tokenizer; a text's first token is given, since nothing predicts it."""
    tokenizer = engine.tokenizer
    if item.text is not None:
        ids = tokenizer.encode(item.text)
        return Passage(ids[:1], ids[1:])
    # The end of the turn is a token too, but the template rather than the model determines it.
    return Passage(tokenizer.encode(_prompt(engine, item)), tokenizer.encode(item.answer))


def _prompt(engine: Engine, item: Item) -> str:
    """Render an item's messages with thinking off, or with the template's default where it refuses that."""
    template = engine.tokenizer.chat_template
    if template is None:
        raise InputError("this model has no chat template: only items with a text can be scored (kinds=[text])")
    options = {} if _refusal(engine, item) else {"enable_thinking": False}
    return template.render(item.messages, item.tools or None, **options)


def _refusal(engine: Engine, item: Item) -> str | None:
    """Return the chat template's reason for not rendering ``item`` with thinking off, if it does so otherwise.

    Qwen3.8's template, for example, says "Disabling thinking is not supported."
    """
    template = engine.tokenizer.chat_template
    if template is None or not item.messages:
        return None
    try:
        template.render(item.messages, item.tools or None, enable_thinking=False)
    except InputError as error:
        template.render(item.messages, item.tools or None)  # raises where thinking is not the reason
        return str(error)
    return None


def log_probabilities(engine: Engine, tokens: Passage) -> Iterator[Floats]:
    """Yield log-probabilities [vocabulary] for each scored token, in order; each but the first after a decode step.

    Raises:
        FlashMoeError: the model's logits are NaN or +inf; code "bad_logits".
    """
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
        """What the reference run was, as in ``Engine.setup``."""

    @classmethod
    def record(cls, engine: Engine, items: Sequence[Item], progress: Progress | None = None) -> "Reference":
        """Run ``engine`` over ``items``."""
        passages = [passage(engine, item) for item in items]
        total = sum(len(one.scored) for one in passages)
        folder = tempfile.TemporaryDirectory(prefix="flashmoe-reference-")
        shape = (total, engine.model.config.vocab_size)
        path = Path(folder.name) / "log_probabilities.f32"
        with name_in_errors(path):
            values = np.memmap(path, np.float32, "w+", shape=shape)
        row = 0
        for index, one in enumerate(passages):
            if progress:
                progress("reference", index, len(passages))
            for distribution in log_probabilities(engine, one):
                values[row] = distribution
                row += 1
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
class Answer:
    """What the model said to an item, and how it was judged."""

    item: Item
    text: str
    right: bool
    parsed: bool | None = None
    """Of an item with a schema: whether the whole answer is JSON."""
    valid: bool | None = None
    """Of an item with a schema: whether that JSON satisfies it."""


@dataclass(frozen=True)
class Quality:
    """Everything that ``evaluate`` found; ``summary`` has the figures."""

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
            raise InputError("the reference was recorded over other items, or by a model with another vocabulary")
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


def judge(item: Item, text: str) -> Answer:
    """Whether ``text`` is a right answer to ``item``."""
    if item.exact is not None:
        return Answer(item, text, text == item.exact)
    if item.call is not None:
        rest, calls = parse_tool_calls(text, item.tools)
        made = [{"name": call.name, "arguments": call.arguments} for call in calls if call.complete]
        return Answer(item, text, not rest and made == [item.call])
    assert item.schema is not None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Answer(item, text, False, parsed=False, valid=False)
    valid = _jsonschema().Draft202012Validator(item.schema).is_valid(value)
    # Python takes True for 1: compare the texts.
    same = json.dumps(value, sort_keys=True) == json.dumps(item.json, sort_keys=True)
    return Answer(item, text, valid and same, parsed=True, valid=valid)


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
