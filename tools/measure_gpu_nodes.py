"""Measure a token of a model in the memory of two GPUs of one host, which share its experts, beside one GPU.

    python tools/measure_gpu_nodes.py
    python tools/measure_gpu_nodes.py --backend ring --tiny        # the same on a CPU, to try the script

Makes a model with random weights and the geometry of the 397B, 16 layers of 64 experts, unless it is in the cache. Then
it runs one process with one GPU, two processes with two GPUs, twice, and the first again. For each run it prints the
milliseconds of a token of each answer (the mean without the first 16, since several tokens may arrive together), where
the time of the host goes, how many tokens are those of one GPU, and the time of a sum of all GPUs in a chain of 60.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes
from flashmoe_mlx.nodes.group import Nodes, launched
from flashmoe_mlx.paths import user_cache

FULL = SyntheticSizes(16, 4096, 64, 10, 1024, 1024, 32, 2, 256, 16, 64, 128, 128, 262144, 4, 0)
TINY = SyntheticSizes(4, 128, 16, 4, 128, 128, 4, 1, 32, 1, 4, 32, 32, 256, 4, 0)
PROMPT = [index * 37 % 250 for index in range(64)]
LEFT_OUT = 16
CHAIN = 60
LAUNCH = "from mlx._distributed_utils.launch import main; main()"


def chain_seconds(nodes: Nodes, width: int) -> float:
    """Return the seconds of a sum f32 [1, width] over all nodes in a chain."""
    best = float("inf")
    for _ in range(5):
        x = mx.zeros((1, width), mx.float32)
        mx.eval(x)
        start = perf_counter()
        for _ in range(CHAIN):
            x = nodes.add_lazily(x)
        mx.eval(x)
        best = min(best, perf_counter() - start)
    return best / CHAIN


def node(pack: str, out: str, tokens: int, rounds: int) -> None:
    """Answer ``rounds`` times as one process, or as one of several nodes; node 0 writes the measurements to ``out``."""
    nodes = Nodes(timeout=120.0) if launched() else None
    start = perf_counter()
    with flashmoe_mlx.load(pack, backend="resident", prompt_cache_gib=0, nodes=nodes) as engine:
        loaded = perf_counter() - start
        width = engine.model.config.hidden_size
        if nodes is not None and nodes.rank:
            engine.follow()
        else:
            measured = measure(engine, tokens, rounds) | {"load_seconds": loaded}
    # The other nodes have ended their part of the engine when this one has closed it.
    sums = {} if nodes is None else sum_microseconds(nodes, width)
    if nodes is None or nodes.rank == 0:
        Path(out).write_text(json.dumps(measured | sums))


def measure(engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the measurements of ``rounds`` answers of ``tokens`` tokens."""
    steps, phases, answers = [], [], []
    for _ in range(rounds):
        sequence = engine.runner.begin(Request(PROMPT, ChosenSampling(SamplingOptions()), max_tokens=tokens))
        with engine.runner.exclusive():
            engine.runner.prefill(sequence)
            while sequence.finish_reason is None:
                engine.runner.decode([sequence])
        decode = sequence.metrics.decode
        steps.append(sum(decode.steps[LEFT_OUT:]) / len(decode.steps[LEFT_OUT:]) * 1e3)
        phases.append({name: spent / len(decode.steps) * 1e3 for name, spent in decode.phases.items()})
        answers.append(sequence.token_ids)
    return {
        "ms": steps,
        "phases_ms": phases[-1],
        "answers": answers,
        "replaced": engine.setup["replaced_kernels"],
        "device": mx.device_info().get("device_name"),
        "experts_read_gb": engine.store.stats().bytes_read / 1e9,
    }


def sum_microseconds(nodes: Nodes, width: int) -> dict[str, float]:
    """Return the microseconds of a sum and of an order of node 0."""
    seconds = chain_seconds(nodes, width)
    messages = []
    for _ in range(20):
        start = perf_counter()
        nodes.message({"a": 1} if nodes.rank == 0 else None)
        messages.append(perf_counter() - start)
    return {"sum_us": seconds * 1e6, "order_us": float(np.median(messages)) * 1e6}


def first_difference(one: list[int], other: list[int]) -> int:
    """Return the number of equal tokens before the first different one."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def run(arguments: list[str], backend: str | None, cpu: bool) -> dict[str, Any]:
    """Run this script as one process, or as two nodes; return what node 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--out", str(out), *["--cpu"] * cpu]
        if backend is not None:
            command = [sys.executable, "-c", LAUNCH, "-n", "2", "--backend", backend, "--", *command]
        ended = subprocess.run(  # noqa: S603  # this script
            command, capture_output=True, text=True, timeout=300, check=False
        )
        if ended.returncode or not out.exists():
            raise SystemExit(f"{' '.join(command)}\nfailed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def main() -> None:
    """Make the model, run all processes in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="nccl", help="nccl, or ring")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2, help="answers of a process")
    parser.add_argument("--node", help="run as a node with this pack")
    parser.add_argument("--out")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.cpu or options.tiny:
        mx.set_default_device(mx.cpu)
    if options.node:
        node(options.node, options.out, options.tokens, options.rounds)
        return
    start = perf_counter()
    pack = synthetic_pack("tiny" if options.tiny else "synthetic", TINY if options.tiny else FULL, user_cache()).folder
    print(f"model {pack}, {perf_counter() - start:.0f} s", flush=True)
    arguments = ["--node", str(pack), "--tokens", str(options.tokens), "--rounds", str(options.rounds)]
    first: list[int] | None = None
    for turn, backend in enumerate([None, options.backend, options.backend, None]):
        result = run(arguments, backend, options.tiny)
        first = first or result["answers"][0]
        same = [first_difference(first, answer) for answer in result["answers"]]
        if turn == 0:
            print(f"{result['device']}, replaced kernels: {result['replaced'] or 'none'}")
        sums = ""
        if backend is not None:
            sums = f"; a sum in a chain {result['sum_us']:.0f} us, an order {result['order_us']:.0f} us"
        ms = ", ".join(f"{one:.2f}" for one in result["ms"])
        phases = sorted(result["phases_ms"].items(), key=lambda one: -one[1])
        spent = ", ".join(f"{name} {ms:.2f}" for name, ms in phases)
        print(
            f"{'one' if backend is None else f'two by {backend}'}: {ms} ms a token; "
            f"{spent}; the first {same} of {len(first)} tokens are those of one GPU; "
            f"node 0 read {result['experts_read_gb']:.2f} GB, loaded in "
            f"{result['load_seconds']:.1f} s{sums}; {perf_counter() - start:.0f} s so far",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast of NVLink fails on some hosts
    main()
