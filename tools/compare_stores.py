"""Decode with several backends in turn, end to end, and compare: tokens a second, and what of it is reading.

    python tools/compare_stores.py <pack> pread io_uring io_uring:registered=true --experts-k 4 --tokens 12 --rounds 6

Every backend stays open (so mmap can only be compared --warm: pages that are mapped stay in the page cache). In a round
each decodes the same tokens from a state of its own, after the pages of the pack were dropped from the page cache (or,
with --warm, as the round before left them); every other round in reverse order. Backends must choose the same tokens.
Intervals are 95 % bootstrap intervals over rounds.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

import flashmoe_mlx
from flashmoe_mlx.engine.engine import Engine
from flashmoe_mlx.pack.pack import open_pack
from flashmoe_mlx.research.intervals import median_interval
from flashmoe_mlx.storage.page_cache import evict


@dataclass
class Contender:
    """A backend with its options, and of each round: seconds of each token, seconds of fetching, bytes read."""

    label: str
    engine: Engine
    tokens: list[list[float]] = field(default_factory=list)
    fetching: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)

    def run(self, first: int, count: int) -> None:
        """Decode ``count`` tokens after ``first``."""
        cache, token, seconds, chosen = self.engine.new_cache(), first, [], []
        before = self.engine.store.stats()
        for _ in range(count):
            start = time.perf_counter()
            token = int(self.engine.forward([token], cache)[-1].argmax())
            seconds.append(time.perf_counter() - start)
            chosen.append(token)
        done = self.engine.store.stats() - before
        self.tokens.append(seconds)
        self.fetching.append(done.fetch_seconds)
        self.nbytes.append(done.bytes_read)
        self.chosen.append(chosen)

    def rates(self) -> npt.NDArray[np.float64]:
        """Tokens a second of each round."""
        return np.array([len(seconds) / sum(seconds) for seconds in self.tokens])


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("backends", nargs="+", help="name, or name:option=value,option=value")
    parser.add_argument("--experts-k", type=int)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    contenders = []
    for text in arguments.backends:
        name, _, given = text.partition(":")
        pairs = (part.partition("=") for part in given.split(",") if part)
        options = {key: yaml.safe_load(value) for key, _, value in pairs}
        contenders.append(Contender(text, flashmoe_mlx.load(arguments.pack, name, arguments.experts_k, **options)))
    for contender in contenders:  # compiles kernels, opens files, touches the resident weights
        Contender("", contender.engine).run(1, 2)
    for number in range(arguments.rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            if not arguments.warm:
                evict(_files(arguments.pack))
            contender.run(2 + number, arguments.tokens)
    if any(contender.chosen != contenders[0].chosen for contender in contenders):
        raise SystemExit("the backends do not generate the same tokens")
    _report(contenders, arguments)


def _files(pack: Path) -> list[Path]:
    return [experts.layer_path(n) for experts in open_pack(pack).experts.values() for n in range(experts.num_layers)]


def _report(contenders: list[Contender], arguments: argparse.Namespace) -> None:
    print(f"{'backend':44} {'tok/s':>22} {'ms/token p5/p50/p95':>22} {'reading':>9} {'MB/token':>9} {'x first':>22}")
    rows = []
    for contender in contenders:
        rates = contender.rates()
        ratio = rates / contenders[0].rates()
        times = 1e3 * np.concatenate(contender.tokens)
        reading = 1e3 * sum(contender.fetching) / times.size
        spread = "/".join(f"{value:.1f}" for value in np.percentile(times, (5, 50, 95)))
        print(
            f"{contender.label:44} {_shown(rates):>22} {spread:>22} {reading:6.1f} ms "
            f"{sum(contender.nbytes) / times.size / 1e6:9.1f} {_shown(ratio):>22}"
        )
        rows.append({"backend": contender.label, "seconds": contender.tokens, "fetching": contender.fetching})
    if arguments.out:
        arguments.out.write_text(json.dumps({"arguments": vars(arguments), "runs": rows}, default=str))


def _shown(values: npt.NDArray[np.float64]) -> str:
    interval = median_interval(values.tolist())
    return f"{np.median(values):.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


if __name__ == "__main__":
    main()
