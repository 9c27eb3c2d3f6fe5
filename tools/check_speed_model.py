"""Check the speed model: probe this machine, predict the speed of configurations that were not probed, and run them.

    python tools/check_speed_model.py <folder for packs, 7 GB> --out <folder for the record>
    python tools/check_speed_model.py <folder> --prepare      # only make packs and traces, which takes minutes

The probe has not measured any tested K or budget, the geometry of the 122B, packs of this size, or the prompt; hits are
predicted from the trace of a different prompt. Each round runs all configurations, in reverse order in every second
round. A trial is disturbed if other processes used more than a tenth of the processors. Disturbed trials are kept in
the record but do not count in the medians.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from flashmoe_mlx.engine import Engine, load
from flashmoe_mlx.formats.files import write_json
from flashmoe_mlx.formats.trace import RoutingTrace
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.models.registry import parse_config
from flashmoe_mlx.research.environment import environment
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.probe import probe
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.estimate.speed_model import Distribution, SpeedModel, certainly
from flashmoe_mlx.research.traces.cache_design import CacheDesign
from flashmoe_mlx.research.traces.recorder import recorded
from flashmoe_mlx.research.traces.simulator import replay

_LARGE = SIZES["large"]
PACKS = {
    "397B": replace(_LARGE, num_experts=128, seed=1),
    "122B": replace(_LARGE, hidden_size=3072, num_experts=96, experts_per_token=8, seed=1),
    "397B 2 bits": replace(_LARGE, num_experts=96, bits=2, seed=1),
}
GIB = 2**30
PROMPT_TOKENS = 16
WARM_UP = 96
"""Tokens that use nearly all experts once."""
DISTURBED = 0.1
"""Largest share of the processors that other processes may use in an undisturbed trial."""
SEED, TRACE_SEED = 1, 2


@dataclass(frozen=True)
class Configuration:
    """A configuration to predict and to run.

    Attributes:
        pack: key of ``PACKS``.
        backend: name of the store.
        experts_k: experts per token.
        way: way of reading from which the speed is predicted; None if nothing is read.
        options: options of the store.
        slots: slots per layer of ``ram_hybrid``; None for other stores.
    """

    pack: str
    backend: str
    experts_k: int
    way: str | None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    slots: int | None = None

    @property
    def label(self) -> str:
        """The name of the configuration in the table."""
        options = "".join(f" {key}={str(value).lower()}" for key, value in self.options.items())
        return f"{self.pack}, K={self.experts_k}, {self.backend}{options}" + (
            f", {self.slots} slots per layer" if self.slots else ""
        )


_URING = {"reader": "io_uring", "depth": 64, "direct": True}
CONFIGURATIONS = (
    Configuration("397B", "resident", 6, None),
    Configuration("397B", "pread", 8, "pread warm"),
    Configuration("397B", "mmap", 6, "mmap warm"),
    Configuration("397B", "pread", 6, "pread direct", {"direct": True}),
    Configuration("397B", "io_uring", 8, "io_uring direct"),
    Configuration("397B", "ram_hybrid", 6, "io_uring direct", _URING, 36),
    Configuration("397B", "ram_hybrid", 8, "pread direct", {"direct": True}, 72),
    Configuration("122B", "io_uring", 7, "io_uring direct"),
    Configuration("122B", "ram_hybrid", 5, "pread direct", {"direct": True}, 32),
    Configuration("397B 2 bits", "pread", 6, "pread direct", {"direct": True}),
)


@dataclass(frozen=True)
class Trial:
    """The mean seconds of a decoded token, and the share of the processors that other processes used meanwhile."""

    seconds: float
    others: float


class OtherProcesses:
    """A measurement of the processor time used by other processes, from the creation of this object."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy_at_start = self._busy_seconds()

    @staticmethod
    def _busy_seconds() -> float:
        system, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(system) - system.idle - getattr(system, "iowait", 0.0)
        return float(busy - own.user - own.system)

    def share(self) -> float:
        """Return the used share of all processors."""
        passed = (time.perf_counter() - self._start) * (psutil.cpu_count() or 1)
        return max(0.0, self._busy_seconds() - self._busy_at_start) / passed


def main() -> None:
    """Make the packs, probe the machine, predict and run the configurations, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--probe-seconds", type=float, default=60)
    parser.add_argument("--probe", type=Path, help="file with the probe; measured and written if it does not exist")
    parser.add_argument("--rounds", type=int, default=4, help="0: only probe")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120, help="time after which no further round begins")
    arguments = parser.parse_args()
    console = Console(width=200)
    folders = {
        name: synthetic_pack(name.replace(" ", "-"), sizes, arguments.folder).folder for name, sizes in PACKS.items()
    }
    reads = {
        configuration: dict(_reads(configuration, folders[configuration.pack], arguments.folder, arguments.tokens))
        for configuration in CONFIGURATIONS
    }
    if arguments.prepare:
        return
    with console.status("") as status:
        others = OtherProcesses()
        profile = None if arguments.probe is None else MachineProfile.load(arguments.probe)
        if profile is None:
            profile = probe(arguments.folder, arguments.probe_seconds, status.update)
            if arguments.probe is not None:
                profile.save(arguments.probe)
        others_of_probe = others.share()
        measured: dict[Configuration, list[Trial]] = {configuration: [] for configuration in CONFIGURATIONS}
        start = time.perf_counter()
        for number in range(arguments.rounds):
            if time.perf_counter() - start > arguments.seconds:
                break
            for configuration in CONFIGURATIONS[:: 1 if number % 2 == 0 else -1]:
                status.update(f"round {number + 1}, {configuration.label}")
                measured[configuration].append(_run(configuration, folders[configuration.pack], arguments.tokens))
    if not arguments.rounds:
        console.print(f"other processes used {others_of_probe:.0%} of the processors during the probe")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [
        _row(configuration, folders[configuration.pack], profile, reads[configuration], measured[configuration])
        for configuration in CONFIGURATIONS
    ]
    record = {
        "environment": environment(),
        "probe": profile.to_json(),
        "others_of_probe": others_of_probe,
        "settings": rows,
    }
    write_json(arguments.out / "check_speed_model.json", record)
    console.print(_table(rows))
    console.print(f"other processes used {others_of_probe:.0%} of the processors during the probe")


def _options(configuration: Configuration, folder: Path) -> dict[str, Any]:
    """Return the options of the store, with the budget for its slots."""
    if configuration.slots is None:
        return dict(configuration.options)
    source = open_model(folder).variant(None)
    return {
        "budget_gib": configuration.slots * source.layout.bytes_in_all_layers / GIB,
        **configuration.options,
    }


def _reads(configuration: Configuration, folder: Path, cache: Path, tokens: int) -> Iterator[tuple[str, Distribution]]:
    """Yield the way of reading with the distribution of reads per layer.

    For ``ram_hybrid``, the distribution comes from a simulation with a different prompt, whose trace is kept in
    ``cache``.
    """
    if configuration.way is None:
        return
    if configuration.slots is None:
        yield configuration.way, certainly(configuration.experts_k)
        return
    path = cache / f"{configuration.pack.replace(' ', '-')}-{configuration.experts_k}-{tokens}.moetrace"
    if not path.exists():
        with (
            load(folder, "pread", experts_k=configuration.experts_k, prompt_cache_gib=0) as engine,
            recorded(engine) as recorder,
        ):
            given, _ = _decode(engine, tokens, TRACE_SEED)
            recorder.trace(engine.model.config.num_experts, given).save(path)
    misses = replay(RoutingTrace.load(path), CacheDesign("lru", configuration.slots)).misses
    yield configuration.way, misses / misses.sum()


def _run(configuration: Configuration, folder: Path, tokens: int) -> Trial:
    """Run one generation with a new store, which is empty at the start as in the simulation."""
    if configuration.way is not None and configuration.way.endswith("warm"):
        for path in folder.rglob("*.bin"):
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
    with load(
        folder, configuration.backend, experts_k=configuration.experts_k, **_options(configuration, folder)
    ) as engine:
        if configuration.way is None or configuration.way.endswith("warm"):
            # The probe reuses its few experts, so that all of their pages are mapped.
            engine.forward(np.random.default_rng(TRACE_SEED).integers(256, size=WARM_UP).tolist(), engine.new_cache())
        others = OtherProcesses()
        _, seconds = _decode(engine, tokens, SEED)
        return Trial(seconds / tokens, others.share())


def _decode(engine: Engine, tokens: int, seed: int) -> tuple[list[int], float]:
    """Decode random tokens, because a random model may end its answer early; return the prompt and the seconds."""
    token_ids = np.random.default_rng(seed).integers(256, size=PROMPT_TOKENS + tokens).tolist()
    cache = engine.new_cache()
    engine.forward(token_ids[:PROMPT_TOKENS], cache)
    start = time.perf_counter()
    for token in token_ids[PROMPT_TOKENS:]:
        engine.forward([token], cache)
    return token_ids[:PROMPT_TOKENS], time.perf_counter() - start


def _row(
    configuration: Configuration,
    folder: Path,
    profile: MachineProfile,
    reads: Mapping[str, Distribution],
    trials: list[Trial],
) -> dict[str, Any]:
    """Return the prediction and the measurements of a configuration, in the form of the record."""
    seconds = [trial.seconds for trial in trials if trial.others <= DISTURBED]
    published = json.loads((folder / "config.json").read_text())
    predicted = SpeedModel(profile).predict(
        parse_config(published), PACKS[configuration.pack].bits, configuration.experts_k, reads
    )
    return {
        "setting": configuration.label,
        "predicted": 1 / predicted.seconds,
        "reading": predicted.reading / predicted.seconds,
        "measured": 1 / median(seconds) if seconds else None,
        "rounds": [1 / value for value in seconds],
        "error": median(seconds) / predicted.seconds - 1 if seconds else None,
        "passes": [asdict(trial) for trial in trials],
        "details": asdict(configuration),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for heading in ("predicted tok/s", "reading", "measured", "rounds", "error", "others"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["setting"],
            f"{row['predicted']:.2f}",
            f"{row['reading']:.0%}",
            f"{row['measured']:.2f}" if row["rounds"] else "-",
            " ".join(f"{rate:.2f}" for rate in row["rounds"]),
            f"{row['error']:+.0%}" if row["rounds"] else "-",
            " ".join(f"{trial['others']:.0%}" for trial in row["passes"]),
        )
    return table


if __name__ == "__main__":
    main()
