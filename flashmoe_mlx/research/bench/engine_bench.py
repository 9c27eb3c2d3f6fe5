"""Compare the speed of the engine under several configurations, in interleaved trials.

A trial loads the model with one configuration, evicts the expert files from the page cache, checks the eviction, and
generates. In each round, every configuration continues the same prompt. The order of the configurations is reversed in
every second round, so that a drift in the machine's speed affects all of them equally.

Conditions:

- cold: measurement starts right after the eviction.
- warm: the trial first continues the same prompt without measuring, which fills the slots and the page cache with
  experts of that prompt.
- rotating: the trial first continues a different prompt without measuring.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.errors import FlashMoeError, InputError
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.research.bench.files import cached_share, expert_files
from flashmoe_mlx.research.estimate.sizes import LEAST_SLOTS, resident_bytes
from flashmoe_mlx.stores.contract import BackendUnavailableError
from flashmoe_mlx.stores.page_cache import evict
from flashmoe_mlx.stores.registry import open_store

CONDITIONS = ("cold", "warm", "rotating")
_LEAST_BITS = 4
"""Bits of resident matrices; packs may have more."""
_PROGRAM = 2**25
"""Bytes of buffers and modules of a trial; measured for the demo model: 24 to 40 MB."""


@dataclass(frozen=True)
class Configuration:
    """A configuration of the engine to compare.

    Attributes:
        label: name of the configuration in tables and records.
        backend: ``_target_`` and all options of the store.
        experts_k: experts per token; None for the model's own number.
        prefetch: name of the prefetch policy.
    """

    label: str
    backend: Mapping[str, Any]
    experts_k: int | None
    prefetch: str


@dataclass(frozen=True)
class Plan:
    """The trials of a benchmark: every configuration in every condition and round.

    Attributes:
        folder: directory of the model.
        settings: configurations to compare.
        conditions: members of ``CONDITIONS``.
        prompts: round n continues ``prompts[n % len(prompts)]``.
        raw: whether prompts bypass the chat template.
        tokens: tokens to generate in each trial.
        rounds: number of rounds.
        kernels: choice of kernels, as in ``load``.
        activations: types of the inputs of products, as in ``load``.
        kv_bits: width of cached keys and values, as in ``load``.
    """

    folder: Path
    settings: Sequence[Configuration]
    conditions: Sequence[str]
    prompts: Sequence[str]
    raw: bool
    tokens: int
    rounds: int
    kernels: str
    activations: str = "auto"
    kv_bits: int | None = None


@dataclass(frozen=True)
class Trial:
    """Measurements of one configuration in one condition and round.

    Attributes:
        setting: label of the configuration.
        condition: member of ``CONDITIONS``.
        round: number of the round, from 0.
        prompt: text that was continued.
        cached: share of the experts' bytes in the page cache at the start of the measurement.
        experts: directory of the expert files.
        token_ids: generated tokens.
        decode_steps: seconds of each decoded token.
        record: setup and measurements, as in ``metrics.json``.
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
        """The key that identifies the trial within a plan: configuration, condition and round."""
        return self.setting, self.condition, self.round

    @property
    def rate(self) -> float:
        """Tokens per second in ``stage``."""
        if self.decode_steps:
            return len(self.decode_steps) / sum(self.decode_steps)
        return float(self.record["prefill"]["tokens"] / self.record["prefill"]["seconds"])

    @property
    def stage(self) -> str:
        """The measured stage: "decode", or "prefill" if the plan generates one token only."""
        return "decode" if self.decode_steps else "prefill"


def least_memory(folder: Path) -> int:
    """Estimate the bytes that a trial of the model in ``folder`` allocates at least, whatever the backend.

    Raises:
        InputError: the model cannot be opened.
    """
    files = open_model(folder)
    record = min(source.layout.record_bytes for source in files.experts.values())
    # The sizes of a model that runs through mlx-lm tell nothing about its resident weights.
    resident = resident_bytes(files.config, _LEAST_BITS) if isinstance(files.config, ModelConfig) else 0
    return resident + LEAST_SLOTS * record + _PROGRAM


def find_unavailable(plan: Plan) -> dict[str, str]:
    """Open every store once; return the labels of configurations that cannot run here, with the reasons.

    Raises:
        InputError: the model cannot be opened.
    """
    files = open_model(plan.folder)
    reasons = {}
    for configuration in plan.settings:
        k = configuration.experts_k
        if k is not None and not 1 <= k <= files.config.num_experts:
            reasons[configuration.label] = f"experts_k={k}: there are {files.config.num_experts} experts"
            continue
        try:
            open_store(files, configuration.backend, {})[0].close()
        except (InputError, BackendUnavailableError) as error:
            reasons[configuration.label] = str(error)
    return reasons


def run_trials(
    plan: Plan, done: Sequence[Trial], announce: Callable[[str], object], failures: dict[str, str]
) -> Iterator[Trial]:
    """Run every trial of ``plan`` that is not in ``done``, and yield it when it ends.

    Args:
        plan: configurations, conditions, prompts and rounds.
        done: trials of an earlier run, which are not repeated.
        announce: called with a description of each trial before it begins.
        failures: reasons by label; a failed configuration is added here, and its remaining trials are skipped.

    Raises:
        FlashMoeError: two stores that serve the same experts produced different tokens (code "different_tokens").
    """
    first_trials: dict[tuple[Any, ...], Trial] = {}
    for trial in done:
        _check_tokens(trial, first_trials)
    finished = {trial.place for trial in done}
    for number in range(plan.rounds):
        for condition in plan.conditions:
            for configuration in plan.settings if number % 2 == 0 else plan.settings[::-1]:
                label = configuration.label
                if label in failures or (label, condition, number) in finished:
                    continue
                announce(f"round {number + 1} of {plan.rounds}, {condition}, {label}")
                try:
                    trial = _run(plan, configuration, condition, number)
                except FlashMoeError as error:
                    failures[label] = f"{condition}, round {number + 1}: {error}"
                    continue
                _check_tokens(trial, first_trials)
                yield trial


def _run(plan: Plan, configuration: Configuration, condition: str, number: int) -> Trial:
    prompt, next_prompt = (plan.prompts[(number + step) % len(plan.prompts)] for step in (0, 1))
    with load(
        plan.folder,
        configuration.backend,
        configuration.experts_k,
        kernels=plan.kernels,
        activations=plan.activations,
        kv_bits=plan.kv_bits,
        prefetch=configuration.prefetch,
        prompt_cache_gib=0,
    ) as engine:
        files = expert_files(engine.store.source)
        if condition != "warm" or sys.platform == "linux":
            # Loading may have read expert files, and the first forward pass may map them: evict in between.
            evict(files)
        if condition != "cold":
            _generate(engine, prompt if condition == "warm" else next_prompt, plan)
        cached = cached_share(files)
        token_ids = _generate(engine, prompt, plan)
        return Trial(
            setting=configuration.label,
            condition=condition,
            round=number,
            prompt=prompt,
            cached=cached,
            experts=str(files[0].parent),
            token_ids=tuple(token_ids),
            decode_steps=tuple(engine.metrics.decode.steps),
            record={**engine.setup, **engine.stats()},
        )


def _generate(engine: Engine, prompt: str, plan: Plan) -> list[int]:
    raw = plan.raw or engine.tokenizer.chat_template is None
    pieces = engine.generate(prompt, max_tokens=plan.tokens, temperature=0, raw=raw, ignore_eos=True)
    tokens = [token for piece in pieces for token in piece.token_ids]
    if len(tokens) < min(2, plan.tokens):
        raise InputError(
            f"the prompt fills the context of {engine.model.config.max_context} tokens, which leaves no token to "
            "decode and measure; use a shorter prompt",
            code="context_full",
        )
    return tokens


def _check_tokens(trial: Trial, first_trials: dict[tuple[Any, ...], Trial]) -> None:
    """Compare the tokens of ``trial`` with those of the first trial with the same experts, K and prompt.

    Raises:
        FlashMoeError: they differ (code "different_tokens").
    """
    first = first_trials.setdefault((trial.experts, trial.record["experts_k"], trial.prompt), trial)
    if first.token_ids != trial.token_ids:
        pairs = enumerate(zip(first.token_ids, trial.token_ids, strict=False))
        position = next(index for index, (expected, found) in pairs if expected != found)
        raise FlashMoeError(
            f"{trial.setting} ({trial.condition}) and {first.setting} ({first.condition}) chose different tokens, "
            f"beginning at token {position + 1}: one of the two stores is wrong, so the results are invalid",
            code="different_tokens",
        )
