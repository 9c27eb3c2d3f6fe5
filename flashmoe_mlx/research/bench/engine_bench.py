"""Run the engine with several settings in turns and compare their speed from prompt to tokens.

A pass loads the model with a setting's store, drops the experts' files from the page cache, checks that they are gone,
and generates. In each round every setting continues the same prompt. Settings run in reverse order in every second
round, so that a drift of the machine affects all alike.

Conditions: a cold pass starts at once. A warm pass first continues the same prompt without measuring, so that the slots
and the page cache hold as many of its experts as they can. A rotating pass first continues another prompt.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.intervals import median_interval
from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.page_cache import cached_bytes, evict
from flashmoe_mlx.stores.registry import open_store

CONDITIONS = ("cold", "warm", "rotating")


@dataclass(frozen=True)
class Setting:
    """A configuration to compare: ``backend`` with ``_target_`` and all options, experts a token, prefetch."""

    label: str
    backend: Mapping[str, Any]
    experts_k: int | None
    prefetch: str


@dataclass(frozen=True)
class Plan:
    """The work of every setting: continue ``prompts``, one a round in turn, by ``tokens`` tokens."""

    folder: Path
    settings: Sequence[Setting]
    conditions: Sequence[str]
    prompts: Sequence[str]
    raw: bool
    tokens: int
    rounds: int
    kernels: str


@dataclass(frozen=True)
class Pass:
    """One setting in one round and condition.

    ``cached`` is the share of all experts' bytes that was in the page cache when it began; ``experts`` the folder they
    came from; ``decode_steps`` seconds of each decoded token; ``record`` the settings and measurements, as in
    ``metrics.json``.
    """

    setting: str
    condition: str
    round: int
    prompt: str
    cached: float
    experts: str
    token_ids: tuple[int, ...]
    decode_steps: tuple[float, ...]
    record: Mapping[str, Any]

    @property
    def place(self) -> tuple[str, str, int]:
        """The identity of the pass within a plan."""
        return self.setting, self.condition, self.round

    @property
    def rate(self) -> float:
        """Tokens per second of ``stage``."""
        if self.decode_steps:
            return len(self.decode_steps) / sum(self.decode_steps)
        return float(self.record["prefill"]["tokens"] / self.record["prefill"]["seconds"])

    @property
    def stage(self) -> str:
        """The measured part of the run: "decode", or "prefill" if the plan asks for one token and none is decoded."""
        return "decode" if self.decode_steps else "prefill"


def find_unavailable(plan: Plan) -> dict[str, str]:
    """Open every store once; returns the reasons why settings cannot run here, by label.

    Raises:
        InputError: the model itself cannot be opened.
    """
    files = open_model(plan.folder)
    reasons = {}
    for setting in plan.settings:
        if setting.experts_k is not None and not 1 <= setting.experts_k <= files.config.num_experts:
            reasons[setting.label] = f"experts_k={setting.experts_k}: there are {files.config.num_experts} experts"
            continue
        try:
            open_store(files, setting.backend, {})[0].close()
        except (InputError, BackendUnavailableError) as error:
            reasons[setting.label] = str(error)
    return reasons


def run_passes(
    plan: Plan, done: Sequence[Pass], announce: Callable[[str], object], failures: dict[str, str]
) -> Iterator[Pass]:
    """Yield every pass of ``plan`` that is not among ``done`` as it ends; ``announce`` is called before each.

    Args:
        plan: settings, conditions, prompts and rounds.
        done: passes of an earlier run, which count as finished.
        announce: called with a description of each pass before it begins.
        failures: reasons by label; a setting that fails is added here and skipped afterwards.

    Raises:
        FlashMoeError: two stores of the same experts led to different tokens; code "different_tokens".
    """
    tokens: dict[tuple[Any, ...], Pass] = {}
    for one in done:
        _compare(one, tokens)
    finished = {one.place for one in done}
    for number in range(plan.rounds):
        for condition in plan.conditions:
            for setting in plan.settings if number % 2 == 0 else plan.settings[::-1]:
                if setting.label in failures or (setting.label, condition, number) in finished:
                    continue
                announce(f"round {number + 1} of {plan.rounds}, {condition}, {setting.label}")
                try:
                    one = _run(plan, setting, condition, number)
                except FlashMoeError as error:
                    failures[setting.label] = f"{condition}, round {number + 1}: {error}"
                    continue
                _compare(one, tokens)
                yield one


def _run(plan: Plan, setting: Setting, condition: str, number: int) -> Pass:
    prompt, other = (plan.prompts[(number + step) % len(plan.prompts)] for step in (0, 1))
    with load(
        plan.folder, setting.backend, setting.experts_k, kernels=plan.kernels, prefetch=setting.prefetch
    ) as engine:
        files = expert_files(engine.store.source)
        if condition != "warm" or sys.platform == "linux":
            evict(files)  # after loading, which may have read some; before a mapping holds any
        if condition != "cold":
            _generate(engine, prompt if condition == "warm" else other, plan)
        cached = _cached_share(files)
        token_ids = _generate(engine, prompt, plan)
        return Pass(
            setting.label,
            condition,
            number,
            prompt,
            cached,
            str(files[0].parent),
            tuple(token_ids),
            tuple(engine.metrics.decode.steps),
            {**engine.setup, **engine.stats()},
        )


def _generate(engine: Engine, prompt: str, plan: Plan) -> list[int]:
    raw = plan.raw or engine.tokenizer.chat_template is None
    pieces = engine.generate(prompt, max_tokens=plan.tokens, temperature=0, raw=raw, ignore_eos=True)
    tokens = [token for piece in pieces for token in piece.token_ids]
    if len(tokens) < min(2, plan.tokens):
        raise InputError(
            f"the prompt fills the context of {engine.model.config.max_context} tokens: nothing is decoded that could "
            "be measured; give a shorter one",
            code="context_full",
        )
    return tokens


def _compare(one: Pass, tokens: dict[tuple[Any, ...], Pass]) -> None:
    """Raise an error if two stores of the same experts chose different tokens."""
    first = tokens.setdefault((one.experts, one.record["experts_k"], one.prompt), one)
    if first.token_ids != one.token_ids:
        differs = next(
            index for index, pair in enumerate(zip(first.token_ids, one.token_ids, strict=False)) if len(set(pair)) > 1
        )
        raise FlashMoeError(
            f"{one.setting} ({one.condition}) and {first.setting} ({first.condition}) chose different tokens, from "
            f"the {differs + 1}. on: one of them is wrong, and nothing here counts",
            code="different_tokens",
        )


def expert_files(source: ExpertSource) -> list[Path]:
    """Return the files that hold the experts."""
    places = ((layer, expert) for layer in range(source.num_layers) for expert in range(source.num_experts))
    return sorted({extent.path for place in places for extent in source.extents(*place)})


def _cached_share(files: Sequence[Path]) -> float:
    return sum(map(cached_bytes, files)) / sum(path.stat().st_size for path in files)


@dataclass(frozen=True)
class Summary:
    """All passes of a setting in a condition; figures are of ``stage`` unless they say otherwise.

    Attributes:
        setting: its label.
        condition: "cold", "warm" or "rotating".
        stage: "decode" or "prefill".
        experts_k: experts per token.
        rounds: number of passes.
        tokens_per_second: median over rounds.
        interval: 95 % interval of ``tokens_per_second``; None for fewer than 3 rounds.
        ratio: rate relative to the first setting of the condition, median of ratios paired by round.
        ratio_interval: 95 % interval of ``ratio``.
        step_ms: p5, p50 and p95 of a token.
        bytes_per_token: bytes read, mean over all tokens.
        hit_rate: share of requested experts that were in slots; None without requests.
        read_gb_per_second: rate of reads while experts were fetched.
        weights_gb_per_second: bytes of all used weights over the whole time.
        shares: shares of the time: "compute", "io" and so on.
        time_to_first_token: seconds, median.
        prefill_tokens_per_second: median.
        accuracy: share of correct guesses; None without prefetch.
        prefetched: share of misses that were prefetched; None without prefetch.
        wasted_bytes_per_token: prefetched bytes that no request wanted.
        cached: mean share of the experts in the page cache at the start.
        notes: replaced kernels, or a missing extension.
    """

    setting: str
    condition: str
    stage: str
    experts_k: int
    rounds: int
    tokens_per_second: float
    interval: tuple[float, float] | None
    ratio: float
    ratio_interval: tuple[float, float] | None
    step_ms: tuple[float, float, float]
    bytes_per_token: float
    hit_rate: float | None
    read_gb_per_second: float | None
    weights_gb_per_second: float | None
    shares: Mapping[str, float]
    time_to_first_token: float
    prefill_tokens_per_second: float
    accuracy: float | None
    prefetched: float | None
    wasted_bytes_per_token: float
    cached: float
    notes: tuple[str, ...] = ()
    """Remarks about the kernels that ran: those replaced after a failed check, or a missing extension."""

    def to_json(self) -> dict[str, Any]:
        """Return the summary in the form of ``bench.json``."""
        return asdict(self)


def summarise(passes: Sequence[Pass]) -> list[Summary]:
    """Return a summary for each condition and setting, in the order of the first round."""
    groups: dict[tuple[str, str], list[Pass]] = {}
    order = dict.fromkeys(one.setting for number in (0, 1) for one in passes if one.round == number)
    for condition in CONDITIONS:
        for setting in order:
            found = [one for one in passes if (one.setting, one.condition) == (setting, condition)]
            if found:
                groups[condition, setting] = found
    first = {condition: found for (condition, _), found in reversed(groups.items())}
    return [_summary(found, first[condition]) for (condition, _), found in groups.items()]


def _summary(passes: Sequence[Pass], first: Sequence[Pass]) -> Summary:
    base = {one.round: one.rate for one in first}
    rates = [one.rate for one in passes]
    ratios = [one.rate / base[one.round] for one in passes if one.round in base]
    stages = [one.record[one.stage] for one in passes]

    def total(name: str) -> float:
        return float(sum(stage[name] for stage in stages))

    seconds, tokens = total("seconds"), total("tokens")
    phases: dict[str, float] = {}
    for stage in stages:
        for phase, spent in stage["phase_seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + spent
    steps = [step for one in passes for step in one.decode_steps or [one.record["prefill"]["seconds"]]]
    guesses = [one.record["guesses"] for one in passes if one.record["guesses"] is not None]
    predicted = sum(guess["predicted"] for guess in guesses)
    low, median, high = 1e3 * np.percentile(steps, (5, 50, 95))
    return Summary(
        setting=passes[0].setting,
        condition=passes[0].condition,
        stage=passes[0].stage,
        experts_k=passes[0].record["experts_k"],
        rounds=len(passes),
        tokens_per_second=float(np.median(rates)),
        interval=median_interval(rates),
        ratio=float(np.median(ratios)) if ratios else float("nan"),
        ratio_interval=median_interval(ratios),
        step_ms=(float(low), float(median), float(high)),
        bytes_per_token=total("bytes_read") / tokens,
        hit_rate=_ratio(total("hits"), total("experts_requested")),
        read_gb_per_second=_mean([stage["read_gb_per_second"] for stage in stages]),
        weights_gb_per_second=_mean([stage["weights_gb_per_second"] for stage in stages]),
        shares={phase: spent / seconds for phase, spent in phases.items()},
        time_to_first_token=float(np.median([one.record["time_to_first_token"] for one in passes])),
        prefill_tokens_per_second=float(np.median([one.record["prefill"]["tokens_per_second"] for one in passes])),
        accuracy=_ratio(sum(guess["right"] for guess in guesses), predicted),
        prefetched=_ratio(total("prefetched"), total("misses")) if guesses else None,
        wasted_bytes_per_token=total("bytes_wasted") / tokens,
        cached=float(np.mean([one.cached for one in passes])),
        notes=tuple(dict.fromkeys(note for one in passes if (note := one.record.get("note")))),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per else None
