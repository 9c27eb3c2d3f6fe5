"""``backend=auto`` on the command line: the backend that measurements of this machine make the fastest.

A result of ``task=tune`` for the model comes before the speed model, which only knows the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe_mlx.console.output import activity, show
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.prompt_cache.size import prompt_cache_bytes
from flashmoe_mlx.model_files import ModelFiles, open_model
from flashmoe_mlx.research.estimate.automatic import choose_backend, room_for_experts
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile, machine_identity
from flashmoe_mlx.research.estimate.prediction import Estimate
from flashmoe_mlx.research.estimate.probe import probe
from flashmoe_mlx.research.tuning import Tuned, TunedFile
from flashmoe_mlx.stores.memory import GIB, available_memory, slots_on_gpu, total_memory
from flashmoe_mlx.stores.registry import AUTO
from flashmoe_mlx.tasks.shared.keys import ModelChoice
from flashmoe_mlx.tasks.shared.model import cache_folder

_OPTIONS = ("_target_", "variant", "mirrors")


@dataclass(frozen=True)
class Chosen:
    """The settings of a backend, and a prefetch policy."""

    backend: dict[str, Any]
    prefetch: str


def chosen_backend(
    settings: Mapping[str, Any],
    folder: Path,
    choice: ModelChoice,
    experts_k: int | None,
    prompt_cache_gib: float | None = 0,
) -> dict[str, Any]:
    """Return the backend of ``chosen``, for a task that prefetches nothing."""
    return chosen(settings, folder, choice, experts_k, prompt_cache_gib, "none").backend


def chosen(
    settings: Mapping[str, Any],
    folder: Path,
    choice: ModelChoice,
    experts_k: int | None,
    prompt_cache_gib: float | None,
    prefetch: str | None,
) -> Chosen:
    """Return ``settings``, or for ``backend=auto`` the settings of the fastest backend for this model and machine.

    Without a result of ``task=tune``, the first call on a machine measures it for two minutes. The choice and its
    reasons are shown.

    Args:
        settings: the settings of a backend.
        folder: the folder of the model.
        choice: the model, whose cache folder keeps the measurements.
        experts_k: routed experts per token; None for the model's own number.
        prompt_cache_gib: memory for the states of earlier prompts and answers, which experts cannot use; see ``load``.
        prefetch: the prefetch policy; None for "none", or for the choice of ``backend=auto``.

    Raises:
        InputError: an option is set that ``backend=auto`` chooses itself, the model does not fit into memory, or the
            speed model does not know it.
    """
    if settings.get("_target_") != AUTO:
        return Chosen(dict(settings), prefetch or "none")
    check_automatic(settings)
    files = open_model(folder)
    tuned = _tuned(files, settings, choice, experts_k, prompt_cache_gib)
    if tuned is not None:
        show(
            f"backend=auto: {tuned.label}, {tuned.tokens_per_second:.3g} tok/s measured by task=tune on "
            f"{tuned.created[:10]}"
        )
        mirrors = settings.get("mirrors") or tuned.backend.get("mirrors", [])
        return Chosen({**tuned.backend, "mirrors": mirrors}, prefetch or tuned.prefetch)
    profile = machine_profile(cache_folder(choice))
    memory = usable_memory() - prompt_cache_bytes(prompt_cache_gib)
    made = choose_backend(files, profile, memory, settings.get("variant"), experts_k)
    slower = "; ".join(f"{estimate.backend} {estimate.tokens_per_second:.3g}" for estimate in made.slower)
    policy = prefetch or made.prefetch
    show(
        f"backend=auto: {_shown(made.estimate)}{'' if policy == 'none' else f' prefetch={policy}'}, "
        f"{made.estimate.tokens_per_second:.3g} tok/s expected{'' if policy == 'none' else ' without prefetch'} "
        f"({made.estimate.low:.3g} to {made.estimate.high:.3g}){f'; slower: {slower}' if slower else ''}"
    )
    return Chosen(made.settings | {"mirrors": settings.get("mirrors", [])}, policy)


def check_automatic(settings: Mapping[str, Any]) -> None:
    """Raise InputError if ``settings`` of ``backend=auto`` have an option that it chooses itself."""
    for name in settings:
        if name not in _OPTIONS:
            raise InputError(
                f"backend.{name}: backend=auto has only variant and mirrors; to set other options, choose a backend",
                code="unknown_option",
            )


def tuned_file(choice: ModelChoice) -> TunedFile:
    """Return the results of ``task=tune`` in the cache folder."""
    return TunedFile(cache_folder(choice) / "tuned.json")


def _tuned(
    files: ModelFiles,
    settings: Mapping[str, Any],
    choice: ModelChoice,
    experts_k: int | None,
    prompt_cache_gib: float | None,
) -> Tuned | None:
    """Return the result of ``task=tune``, with slots for the memory that is free now; None if there is none that fits.

    For the other arguments, see ``chosen``.
    """
    variant, k = settings.get("variant"), files.config.experts_per_token if experts_k is None else experts_k
    found = tuned_file(choice).get(files.folder, variant, k)
    if found is None:
        return None
    memory = min(usable_memory(), available_memory()) - prompt_cache_bytes(prompt_cache_gib)
    column = files.variant(variant).layout.bytes_in_all_layers
    try:
        room, experts = room_for_experts(files, memory, variant, experts_k)
    except InputError:
        room, experts = 0, column * files.config.num_experts
    return found.within(room, column, experts)


def _shown(estimate: Estimate) -> str:
    budget = f" budget_gib={estimate.budget / GIB:.2f}" if estimate.name == "ram_hybrid" else ""
    return f"{estimate.backend}{budget}"


def usable_memory() -> int:
    """Return the bytes that a run may use; a tenth of the memory, and at least 2 GiB, is left to the system."""
    if slots_on_gpu():
        return available_memory()
    return total_memory() - max(2 * GIB, total_memory() // 10)


def stored_profile(folder: Path) -> MachineProfile | None:
    """Return the measurements of this machine in ``folder``; None if there are none of this machine and software."""
    stored = MachineProfile.load(folder / "probe.json")
    return stored if stored is not None and stored.identity == machine_identity() else None


def machine_profile(folder: Path, seconds: float = 90, renew: bool = False) -> MachineProfile:
    """Return the measurements of this machine in ``folder``; measure it first if there are none.

    Args:
        folder: the cache folder.
        seconds: approximate duration of a measurement.
        renew: whether to measure the machine again.

    Raises:
        FlashMoeError: the models of the measurement cannot be made or run.
    """
    stored = None if renew else stored_profile(folder)
    if stored is not None:
        return stored
    with activity() as announce:
        made = probe(folder, seconds, announce)
    made.save(folder / "probe.json")
    return made
