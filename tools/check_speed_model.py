"""Check the speed model: probe this machine, predict settings that were not probed, run them, and compare.

    python tools/check_speed_model.py <folder for packs, 7 GB> --out <folder for figures and JSON>
    python tools/check_speed_model.py <folder> --prepare      # only make packs and traces, which take a while

Every K, the budgets, one geometry (the 122B's), the packs (larger than the probe's) and the prompt are held out: hits
are predicted from the trace of another prompt. Each round runs all settings in turns, every second round backwards. A
pass during which other processes took more than a tenth of the processors is disturbed: the record keeps it, the
medians leave it out.
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
from flashmoe_mlx.models.config import ModelConfig
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
DISTURBED = 0.1
"""Largest share of the processors that other processes may take in an undisturbed pass."""
SEED, OTHER_SEED = 1, 2


@dataclass(frozen=True)
class Configuration:
    """A configuration to run, the way of reading that predicts it, and the slots per layer of ram_hybrid."""

    pack: str
    backend: str
    experts_k: int
    way: str | None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    slots: int | None = None

    @property
    def label(self) -> str:
        options = "".join(f" {key}={str(value).lower()}" for key, value in self.options.items())
        return f"{self.pack}, K={self.experts_k}, {self.backend}{options}" + (
            f", {self.slots} slots a layer" if self.slots else ""
        )


_URING = {"reader": "io_uring", "depth": 64, "direct": True}
SETTINGS = (
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
    """Mean seconds of a decoded token, and the share of the processors that other processes took meanwhile."""

    seconds: float
    others: float


class Others:
    """A measurement of the processor time that other processes take."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = self._taken()

    @staticmethod
    def _taken() -> float:
        everything, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(everything) - everything.idle - getattr(everything, "iowait", 0.0)
        return float(busy - own.user - own.system)

    def share(self) -> float:
        """Return the share of all processors that other processes took since this object was created."""
        passed = (time.perf_counter() - self._start) * (psutil.cpu_count() or 1)
        return max(0.0, self._taken() - self._before) / passed


def main() -> None:
    """Make the packs, probe, predict, run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--probe-seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120, help="after which no further round begins")
    asked = parser.parse_args()
    console = Console()
    folders = {
        name: synthetic_pack(name.replace(" ", "-"), sizes, asked.folder).folder for name, sizes in PACKS.items()
    }
    reads = {one: dict(_reads(one, folders[one.pack], asked.folder, asked.tokens)) for one in SETTINGS}
    if asked.prepare:
        return
    with console.status("") as status:
        others = Others()
        profile = probe(asked.folder, asked.probe_seconds, status.update)
        others_of_probe = others.share()
        measured: dict[Configuration, list[Trial]] = {one: [] for one in SETTINGS}
        start = time.perf_counter()
        for number in range(asked.rounds):
            if time.perf_counter() - start > asked.seconds:
                break
            for one in SETTINGS[:: 1 if number % 2 == 0 else -1]:
                status.update(f"round {number + 1}, {one.label}")
                measured[one].append(_run(one, folders[one.pack], asked.tokens))
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = [_row(one, folders[one.pack], profile, reads[one], measured[one]) for one in SETTINGS]
    record = {
        "environment": environment(),
        "probe": profile.to_json(),
        "others_of_probe": others_of_probe,
        "settings": rows,
    }
    write_json(asked.out / "check_speed_model.json", record | {"settings": rows})
    console.print(_table(rows))
    console.print(f"other processes took {others_of_probe:.0%} of the processors during the probe")


def _options(one: Configuration, folder: Path) -> dict[str, Any]:
    if one.slots is None:
        return dict(one.options)
    source = open_model(folder).variant(None)
    return {"budget_gib": one.slots * source.num_layers * source.layout.record_bytes / GIB, **one.options}


def _reads(one: Configuration, folder: Path, cache: Path, tokens: int) -> Iterator[tuple[str, Distribution]]:
    """Yield the way of reading with the distribution of reads in a layer; simulates ram_hybrid on another prompt."""
    if one.way is None:
        return
    if one.slots is None:
        yield one.way, certainly(one.experts_k)
        return
    path = cache / f"{one.pack.replace(' ', '-')}-{one.experts_k}-{tokens}.moetrace"
    if not path.exists():
        with load(folder, "pread", experts_k=one.experts_k) as engine, recorded(engine) as recorder:
            given, _ = _decoded(engine, tokens, OTHER_SEED)
            recorder.trace(engine.model.config.num_experts, given).save(path)
    misses = replay(RoutingTrace.load(path), CacheDesign("lru", one.slots)).misses
    yield one.way, misses / misses.sum()


def _run(one: Configuration, folder: Path, tokens: int) -> Trial:
    """Run one generation; the store starts empty, as in the simulation."""
    if one.way is not None and one.way.endswith("warm"):
        for path in folder.rglob("*.bin"):
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
    with load(folder, one.backend, experts_k=one.experts_k, **_options(one, folder)) as engine:
        others = Others()
        _, seconds = _decoded(engine, tokens, SEED)
        return Trial(seconds / tokens, others.share())


def _decoded(engine: Engine, tokens: int, seed: int) -> tuple[list[int], float]:
    """Decode random tokens, since a random model may end its answer at once; return the prompt and the seconds."""
    drawn = np.random.default_rng(seed).integers(256, size=PROMPT_TOKENS + tokens).tolist()
    cache = engine.new_cache()
    engine.forward(drawn[:PROMPT_TOKENS], cache)
    start = time.perf_counter()
    for token in drawn[PROMPT_TOKENS:]:
        engine.forward([token], cache)
    return drawn[:PROMPT_TOKENS], time.perf_counter() - start


def _row(
    one: Configuration, folder: Path, profile: MachineProfile, reads: Mapping[str, Distribution], passes: list[Trial]
) -> dict[str, Any]:
    seconds = [each.seconds for each in passes if each.others <= DISTURBED]
    published = json.loads((folder / "config.json").read_text())
    found = SpeedModel(profile).predict(ModelConfig.from_json(published), PACKS[one.pack].bits, one.experts_k, reads)
    return {
        "setting": one.label,
        "predicted": 1 / found.seconds,
        "reading": found.reading / found.seconds,
        "measured": 1 / median(seconds) if seconds else None,
        "rounds": [1 / value for value in seconds],
        "error": median(seconds) / found.seconds - 1 if seconds else None,
        "passes": [asdict(each) for each in passes],
        "details": asdict(one),
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
            " ".join(f"{one['others']:.0%}" for one in row["passes"]),
        )
    return table


if __name__ == "__main__":
    main()
