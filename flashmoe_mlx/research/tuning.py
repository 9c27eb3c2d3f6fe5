"""A short search for the fastest backend of one model on one machine, and the file that keeps its results.

The search halves: every candidate decodes a few tokens, the faster half decodes twice as many, and so on until the two
fastest candidates run in turns. A trial follows a different prompt, so that slots and the page cache are neither empty
nor filled with exactly the experts of the trial.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Self

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.formats.files import write_atomically
from flashmoe_mlx.formats.untrusted import read_object
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial, run_trials
from flashmoe_mlx.research.estimate.machine_profile import machine_identity
from flashmoe_mlx.stores.memory import GIB, available_memory
from flashmoe_mlx.stores.registry import backend_settings

TUNED_VERSION = 1
_POLICIES = ("none", "early_router", "next_router")
_RING = {"reader": "io_uring", "depth": 64, "direct": True}
_FINALISTS = 2


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration that was measured for a model.

    Attributes:
        backend: ``_target_`` and all options of the store.
        prefetch: name of the prefetch policy.
        label: the backend and the policy in words.
        tokens_per_second: the measured speed.
        created: time of the measurement, in ISO format.
    """

    backend: Mapping[str, Any]
    prefetch: str
    label: str
    tokens_per_second: float
    created: str

    @classmethod
    def now(cls, configuration: Configuration, tokens_per_second: float) -> Self:
        """Return a result that was measured now."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        label, prefetch = configuration.label, configuration.prefetch
        return cls(dict(configuration.backend), prefetch, label, tokens_per_second, created)

    def within(self, room: int, least: int, expert_bytes: int) -> Self | None:
        """Return this result with slots for ``room`` bytes at most; None if the store cannot do with them.

        Args:
            room: bytes of memory for experts.
            least: bytes of one expert from each layer.
            expert_bytes: bytes of all experts.
        """
        if self.backend.get("_target_") == backend_settings("resident")["_target_"]:
            return self if expert_bytes <= room else None
        if "budget_gib" not in self.backend:
            return self  # the store leaves experts to the page cache
        budget, share = self.backend["budget_gib"], self.backend.get("memory_share") or 0
        wanted = share * available_memory() if budget is None else budget * GIB
        if wanted <= room:
            return self
        if room < least:
            return None
        gib = room / GIB
        label = f"{self.label}, with budget_gib={gib:.3g} because less memory is free"
        return replace(self, backend={**self.backend, "budget_gib": gib}, label=label)


class TunedFile:
    """The results for all models on this machine, in a file beside those of the probe.

    Results of another machine, of other software, or of another version of the file do not count.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, folder: Path, variant: str | None, experts_k: int) -> Tuned | None:
        """Return the result for a variant of the model in ``folder`` with K experts; None without one."""
        entry = self._entries().get(_key(folder, variant, experts_k))
        try:
            return None if entry is None else Tuned(**entry)
        except TypeError:
            return None

    def put(self, folder: Path, variant: str | None, experts_k: int, tuned: Tuned) -> None:
        """Keep ``tuned``, replacing an earlier result for the same model."""
        entries = {**self._entries(), _key(folder, variant, experts_k): asdict(tuned)}
        record = {"tuned_version": TUNED_VERSION, "identity": machine_identity(), "models": entries}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(record, indent=1).encode())

    def _entries(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            record = read_object(self._path, strict=True)
            known = record["tuned_version"] == TUNED_VERSION and record["identity"] == machine_identity()
            return dict(record["models"]) if known else {}
        except (FlashMoeError, KeyError, TypeError, ValueError):
            return {}


def _key(folder: Path, variant: str | None, experts_k: int) -> str:
    """Return the key of a model; the folder belongs to it, because its disk decides the speed."""
    return f"{folder.resolve()} variant={variant or 'widest'} experts_k={experts_k}"


def candidates(
    variant: str | None, experts_k: int | None, expert_bytes: int, room: int, mirrors: Sequence[str] = ()
) -> list[Configuration]:
    """Return the configurations to compare.

    Args:
        variant: the variant of the pack.
        experts_k: experts per token.
        expert_bytes: bytes of all experts.
        room: bytes of memory that experts may take.
        mirrors: folders with copies of the experts.
    """
    backends: list[tuple[str, dict[str, Any], Sequence[str]]] = []
    if expert_bytes <= room:
        backends += [("resident", {}, ("none",)), ("mmap", {}, ("none",)), ("pread", {}, ("none",))]
    else:
        for share in (1.0, 0.6):
            budget = {"budget_gib": round(share * room / GIB, 2)}
            backends.append(("ram_hybrid", {**budget, **_RING}, _POLICIES if share == 1 else _POLICIES[:2]))
            if share == 1:
                backends.append(("ram_hybrid", {**budget, "direct": True}, _POLICIES[:2]))
        backends += [("io_uring", {}, _POLICIES[:2]), ("pread", {"direct": True}, ("none",))]
        backends += [("pread", {}, _POLICIES[:2]), ("mmap", {}, ("none",))]
    common = {"variant": variant, "mirrors": list(mirrors)}
    return [
        Configuration(label(name, options, policy), {**backend_settings(name), **common, **options}, experts_k, policy)
        for name, options, policies in backends
        for policy in policies
    ]


def label(backend: str, options: Mapping[str, Any], policy: str) -> str:
    """Return a configuration in the words of the command line."""
    shown = (f"{key}={str(value).lower()}" for key, value in options.items())
    return " ".join([backend, *shown, *([] if policy == "none" else [f"prefetch={policy}"])])


def search(
    plan: Plan, seconds: float, announce: Callable[[str], object], failures: dict[str, str]
) -> tuple[Configuration, float, list[Trial]]:
    """Return the fastest configuration of ``plan``, its tokens per second, and all trials.

    Args:
        plan: the configurations, with the number of tokens of the first round.
        seconds: time after which no further round begins.
        announce: called with a description of each trial before it begins.
        failures: receives the reason of each configuration that failed.

    Raises:
        FlashMoeError: every configuration failed (code "nothing_ran"), or two stores produced different tokens.
    """
    start, trials = time.monotonic(), list[Trial]()
    plan = replace(plan, rounds=1 if len(plan.settings) > _FINALISTS else 2)
    while True:
        latest = list(run_trials(plan, [], announce, failures))
        if not latest:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise FlashMoeError(f"no configuration ran: {reasons}", code="nothing_ran")
        trials += latest
        rates = {
            setting.label: median(found)
            for setting in plan.settings
            if (found := [trial.rate for trial in latest if trial.setting == setting.label])
        }
        ranked = sorted(rates, key=lambda name: -rates[name])
        if plan.rounds > 1 or len(ranked) == 1 or time.monotonic() - start > seconds:
            best = next(setting for setting in plan.settings if setting.label == ranked[0])
            return best, rates[best.label], trials
        kept = ranked[: max(_FINALISTS, -(-len(ranked) // 2))]
        rounds = 2 if len(kept) == _FINALISTS else 1
        settings = [setting for setting in plan.settings if setting.label in kept]
        plan = replace(plan, settings=settings, tokens=2 * plan.tokens, rounds=rounds)
