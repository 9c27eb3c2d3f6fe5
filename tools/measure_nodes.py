"""Measure how fast one process and several processes decode from slow disks; each process has a separate disk.

    python tools/measure_nodes.py --pack <folder> --mb-per-second 100

A store delays each fetch to the given rate, as if every process had its own slow disk. All processes share the page
cache and the memory of this machine, and compute with one thread each. MLX waits busily, with threads that hinder other
processes where there are few cores; ``--pin`` keeps each process on one core. Runs of one and of several processes
alternate. The table has a model beside each speed-up: the time of one process without its reads, plus the reads of the
slowest node of each layer. The model leaves out the time of sums. Comments below the table show where the time of each
node goes: its reads (io), its waits for other nodes (nodes), and computation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

import flashmoe_mlx
from flashmoe_mlx.backends.pread import PreadStore
from flashmoe_mlx.formats.extents import ExpertSource
from flashmoe_mlx.formats.shares import owners
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.nodes.group import Nodes, launched
from flashmoe_mlx.stores.contract import StoreStats
from flashmoe_mlx.stores.delivery import Delivery, ExpertBatch

PROMPT = [5, 17, 42, 8]
LEFT_OUT = 1
LAUNCH = "from mlx._distributed_utils.launch import main; main()"


class SlowStore(PreadStore):
    """A store whose fetches take as long as a disk of a fixed bandwidth takes."""

    def __init__(self, source: ExpertSource, slots: int = 16, mb_per_second: float = 100.0) -> None:
        super().__init__(source, slots)
        self._rate = mb_per_second * 1e6

    def _load(self, layer: int, experts: Sequence[int], delivery: Delivery) -> tuple[ExpertBatch, StoreStats]:  # noqa: ARG002  # delivers all experts at the end
        end = perf_counter() + len(set(experts)) * self.layout[layer].record_bytes / self._rate
        result = super()._load(layer, experts, Delivery(None, len(set(experts))))
        time.sleep(max(0.0, end - perf_counter()))
        return result


def node(options: argparse.Namespace) -> None:
    """Answer once as one process, or as one of several nodes; node 0 writes the measurements."""
    if options.pin:  # before MLX starts threads
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[int(os.environ.get("MLX_RANK", "0")) % len(allowed)]})
    weights = tuple(options.weights) if options.weights else None
    nodes = Nodes(weights, timeout=60.0) if launched() else None
    backend = {"_target_": "measure_nodes.SlowStore", "mb_per_second": options.mb_per_second}
    with flashmoe_mlx.load(options.pack, backend, options.experts_k, prompt_cache_gib=0, nodes=nodes) as engine:
        if nodes is not None and nodes.rank:
            engine.follow()
            spent = dict(engine.runner.clock.seconds)
            Path(f"{options.out}.{nodes.rank}").write_text(json.dumps(spent))
            return
        chosen: list[tuple[int, npt.NDArray[np.uint32]]] = []
        if nodes is None:
            engine.observe_routing(lambda layer, experts: chosen.append((layer, experts.copy())))
        sequence = engine.runner.begin(Request(PROMPT, ChosenSampling(SamplingOptions()), max_tokens=options.tokens))
        with engine.runner.exclusive():
            engine.runner.prefill(sequence)
            while sequence.finish_reason is None:
                engine.runner.decode([sequence])
        decode, record = sequence.metrics.decode, engine.store.layout.record_bytes
    measured: dict[str, Any] = {
        "ms": float(np.median(decode.steps[LEFT_OUT:])) * 1e3,
        "phases": {name: spent / len(decode.steps) * 1e3 for name, spent in decode.phases.items()},
        "tokens": sequence.token_ids,
        "mb_per_token": decode.store.bytes_read / decode.tokens / 1e6,
        "record_mb": record / 1e6,
        "chosen": [[layer, experts[0].tolist()] for layer, experts in chosen if len(experts) == 1],
    }
    Path(options.out).write_text(json.dumps(measured))


def run(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Run this script as ``count`` processes; return what node 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--pack", options.pack, "--out", str(out)]
        command += ["--mb-per-second", str(options.mb_per_second), "--tokens", str(options.tokens)]
        command += ["--experts-k", str(options.experts_k)] if options.experts_k else []
        command += ["--pin"] if options.pin else []
        if count > 1:
            weights = ["--weights", *map(str, options.weights)] if options.weights else []
            command = [sys.executable, "-c", LAUNCH, "-n", str(count), "--backend", "ring", "--", *command, *weights]
        threads = {**os.environ, "FLASHMOE_THREADS": "1"}
        ended = subprocess.run(  # noqa: S603  # this script
            command, capture_output=True, text=True, timeout=300, check=False, env=threads
        )
        if ended.returncode or not out.exists():
            raise SystemExit(f"failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        result["others"] = [json.loads(path.read_text()) for path in sorted(out.parent.glob(f"{out.name}.*"))]
        return result


def slowest_reads(one: dict[str, Any], weights: Sequence[float], rate: float) -> float:
    """Return the milliseconds of a token's reads on the slowest node of each layer, from the choices of one process."""
    chosen = one["chosen"]
    layers = max(layer for layer, _ in chosen) + 1
    most = 0
    for layer, experts in chosen:
        owned = owners(weights, layer, max(256, *experts) + 1)[experts]
        most += int(np.bincount(owned, minlength=len(weights)).max())
    return most * one["record_mb"] / rate * 1e3 / (len(chosen) / layers)


def main() -> None:
    """Run one process and several in turns, and print a row for each number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", required=True)
    parser.add_argument("--mb-per-second", type=float, default=100.0, help="bandwidth of each process's disk")
    parser.add_argument("--experts-k", type=int)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--nodes", type=int, nargs="*", default=[2])
    parser.add_argument("--weights", type=float, nargs="*")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pin", action="store_true", help="run each process on one core")
    parser.add_argument("--out")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if options.out:
        node(options)
        return
    counts = [1, *options.nodes]
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for number in range(options.rounds):
        for count in counts if number % 2 == 0 else counts[::-1]:
            runs[count].append(run(options, count))
    one = min(runs[1], key=lambda result: result["ms"])
    rest = one["ms"] - one["phases"]["io"]
    columns = ("nodes", "ms per token, each run", "reads, ms", "other nodes, ms", "MB per token, node 0")
    print(f"| {' | '.join(columns)} | speed-up | of the model | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for count in counts:
        best = min(runs[count], key=lambda result: result["ms"])
        weights = options.weights or [1.0] * count
        modeled = one["ms"] / (rest + slowest_reads(one, weights if count > 1 else [1.0], options.mb_per_second))
        same = all(result["tokens"] == one["tokens"] for result in runs[count])
        listed = ", ".join(f"{result['ms']:.1f}" for result in runs[count])
        faster = one["ms"] / best["ms"]
        print(
            f"| {count} | {listed} | {best['phases']['io']:.1f} | {best['phases'].get('nodes', 0.0):.1f} "
            f"| {best['mb_per_token']:.2f} | {faster:.2f} | {modeled:.2f} | {'same' if same else 'differ'} |"
        )
        own = [{name: spent * options.tokens / 1e3 for name, spent in best["phases"].items()}, *best["others"]]
        for rank, seconds in enumerate(own):
            listed = ", ".join(f"{name} {spent:.2f}" for name, spent in sorted(seconds.items()))
            print(f"<!-- {count} nodes, seconds of node {rank}: {listed} -->")


if __name__ == "__main__":
    main()
