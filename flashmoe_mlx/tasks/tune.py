"""``task=tune``: find the fastest backend for a model on this machine, and keep it for ``backend=auto``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich.table import Table

from flashmoe_mlx.console.output import activity, print_table, show
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.model_files import ModelFiles, open_model
from flashmoe_mlx.moe.prefetch import check_policy
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial, find_unavailable
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.automatic import room_for_experts
from flashmoe_mlx.research.tuning import Tuned, candidates, label, search
from flashmoe_mlx.stores.memory import GIB, available_memory
from flashmoe_mlx.stores.registry import AUTO, backend_names, backend_settings
from flashmoe_mlx.tasks.shared.automatic import check_automatic, tuned_file, usable_memory
from flashmoe_mlx.tasks.shared.backend_list import short_name
from flashmoe_mlx.tasks.shared.keys import EngineConfig
from flashmoe_mlx.tasks.shared.model import model_folder

TUNE_VERSION = 1
_PROMPTS = ("How does a hash table find a key?", "Write four lines about a lighthouse in winter.")


@dataclass
class Config(EngineConfig):
    """Keys of ``task=tune``."""

    prefetch: str | None = None
    tokens: int = 8
    seconds: float = 300
    memory_gib: float | None = None


def run(config: Config, run_dir: Path) -> float:
    """Search, keep the fastest configuration, and return its tokens per second, the metric of a sweep.

    With another backend than "auto" the search has one configuration, which is kept if it is the fastest so far.
    ``tune.json`` in ``run_dir`` holds all trials.

    Raises:
        InputError: a key is out of range, the model does not fit, or no configuration can run here.
        FlashMoeError: every configuration failed.
    """
    _check(config)
    folder = model_folder(config.model, config.backend)
    files = open_model(folder)
    settings = _settings(config, files)
    plan = Plan(
        folder, settings, ["rotating"], _PROMPTS, True, config.tokens, 1,
        config.kernels, config.activations, config.kv_bits,
    )  # fmt: skip
    left_out = find_unavailable(plan)
    usable = [setting for setting in settings if setting.label not in left_out]
    if not usable:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()))
    failures: dict[str, str] = {}
    with activity() as announce:
        best, rate, trials = search(replace(plan, settings=usable), config.seconds, announce, failures)
    print_table(_table(trials))
    for name, reason in (left_out | failures).items():
        show(f"left out: {name}: {reason}")
    _keep(config, files, best, rate)
    record = {
        "tune_version": TUNE_VERSION,
        "environment": environment(),
        "best": asdict(best),
        "tokens_per_second": rate,
        "passes": [asdict(trial) for trial in trials],
        "left_out": left_out | failures,
    }
    write_json(run_dir / "tune.json", record)
    show(f"record: {run_dir}")
    return rate


def _check(config: Config) -> None:
    if config.tokens < 2 or not config.seconds > 0 or not (config.memory_gib is None or config.memory_gib > 0):
        raise InputError("tokens= must be at least 2, and seconds= and memory_gib= greater than 0", code="out_of_range")
    if config.prefetch is not None:
        check_policy(config.prefetch)
    if config.backend["_target_"] == AUTO:
        check_automatic(config.backend)
        if config.prefetch is not None:
            raise InputError("prefetch=: the search chooses it; it needs another backend than auto")
    elif config.memory_gib is not None:
        raise InputError("memory_gib=: only the search uses it, so it needs backend=auto")


def _settings(config: Config, files: ModelFiles) -> list[Configuration]:
    """Return the configurations to measure: the candidates, or the one that the keys name."""
    backend = config.backend
    if backend["_target_"] != AUTO:
        policy = config.prefetch or "none"
        usual = backend_settings(name) if (name := short_name(backend)) in backend_names() else {}
        options = {key: value for key, value in backend.items() if key != "_target_" and value != usual.get(key)}
        return [Configuration(label(name, options, policy), backend, config.experts_k, policy)]
    memory = min(usable_memory(), available_memory()) if config.memory_gib is None else int(config.memory_gib * GIB)
    variant = backend.get("variant")
    room, size = room_for_experts(files, memory, variant, config.experts_k)
    return candidates(variant, config.experts_k, size, room, backend.get("mirrors") or ())


def _keep(config: Config, files: ModelFiles, best: Configuration, rate: float) -> None:
    """Keep ``best`` for ``backend=auto``; a single configuration only if it is faster than the kept one."""
    file, variant = tuned_file(config.model), best.backend.get("variant")
    k = files.config.experts_per_token if config.experts_k is None else config.experts_k
    earlier = file.get(files.folder, variant, k)
    if config.backend["_target_"] != AUTO and earlier is not None and earlier.tokens_per_second >= rate:
        show(f"{best.label}: {rate:.3g} tok/s; backend=auto keeps {earlier.label} with {earlier.tokens_per_second:.3g}")
        return
    file.put(files.folder, variant, k, Tuned.now(best, rate))
    show(f"backend=auto now takes {best.label}, {rate:.3g} tok/s")


def _table(trials: Sequence[Trial]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("backend", no_wrap=True)
    for heading in ("tok/s", "longest run, tokens", "hits", "MB/token"):
        table.add_column(heading, justify="right")
    runs: dict[str, list[Trial]] = {}
    for trial in trials:
        runs.setdefault(trial.setting, []).append(trial)
    rows: list[tuple[int, float, list[str]]] = []
    for name, measured in runs.items():
        tokens = max(len(trial.decode_steps) for trial in measured)
        longest = [trial for trial in measured if len(trial.decode_steps) == tokens]
        rate, decode = median(trial.rate for trial in longest), longest[-1].record["decode"]
        hits = "-" if decode["hit_rate"] is None else f"{decode['hit_rate']:.0%}"
        read = f"{decode['bytes_per_token'] / 1e6:.4g}"
        rows.append((tokens, rate, [name, f"{rate:.3g}", str(tokens), hits, read]))
    for _, _, cells in sorted(rows, key=lambda row: (-row[0], -row[1])):
        table.add_row(*cells)
    return table
