"""Compare the speed of prompts with llama.cpp and with NumPy's matrix product, on the models of ``compare_llama.py``.

    python -m venv peer && peer/bin/pip install llama-cpp-python gguf numpy      # builds llama.cpp: minutes
    python tools/compare_llama_prompts.py --peer peer/bin/python --layers 4 --experts 64 --folder /tmp/compare

Both programs keep everything in memory. For each length all programs alternate, A B C ... C B A, after one warm-up, so
every figure of a row comes from the same minute. llama.cpp runs with its own batch size, 512. NumPy multiplies as many
vectors by one matrix of 4096 x 4096 in f32. "Of sgemm" divides the multiplications and additions of all products of a
prompt, per second, by NumPy's. "Difference" is ||logits - exact logits|| / ||exact logits|| after each token.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from compare_llama import EXPERTS_PER_TOKEN, gguf_path, write_gguf

_SGEMM = 4096


def main() -> None:
    """Write the models that do not exist yet, run the rounds, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="path of a Python interpreter with llama-cpp-python and gguf")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--lengths", default="64,256,1024", help="tokens of the prompts")
    parser.add_argument("--activations", default="auto,bf16,int8", help="values of activations= to compare")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds of A B ... B A")
    parser.add_argument("--folder", type=Path, default=Path("compare-llama"))
    parser.add_argument("--side", choices=("peer", "write"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "write":
        write_gguf(arguments)
    elif arguments.side == "peer":
        _serve_peer(arguments)
    elif arguments.peer:
        _compare(arguments)
    else:
        parser.error("--peer is needed")


def _compare(arguments: argparse.Namespace) -> None:
    import mlx.core as mx
    import numpy as np

    import flashmoe_mlx
    from flashmoe_mlx.custom_kernels import native
    from flashmoe_mlx.made_models.synthetic import synthetic_pack
    from flashmoe_mlx.research.estimate.probe_models import SIZES
    from flashmoe_mlx.research.intervals import median_interval

    mx.set_default_device(mx.cpu)
    counts = {"num_layers": arguments.layers, "num_experts": arguments.experts}
    sizes = replace(SIZES["large"], **counts, experts_per_token=EXPERTS_PER_TOKEN)
    arguments.sizes = asdict(sizes)  # the peer's interpreter has no flashmoe_mlx
    pack = synthetic_pack("compare", sizes, arguments.folder).folder
    if not gguf_path(arguments).exists():
        _start_peer(arguments, "write").wait()
    operations = _operations_per_token(arguments.sizes)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    with ExitStack() as stack:
        peer = stack.enter_context(_start_peer(arguments, "peer"))
        engines = {
            name: stack.enter_context(flashmoe_mlx.load(pack, "resident", activations=name))
            for name in arguments.activations.split(",")
        }
        print(f"{native.description()}; {operations / 1e9:.2f} GFLOP per token")
        print(f"medians of {2 * arguments.rounds} rounds, 95 % bootstrap intervals\n")
        print("| tokens | | tokens/s | GFLOP/s | of sgemm | of llama.cpp | difference |\n|---|---|---|---|---|---|---|")
        for length in lengths:
            tokens = _prompt(length)
            x, w = (np.random.default_rng(0).standard_normal((n, _SGEMM), np.float32) for n in (length, _SGEMM))
            logits: dict[str, Any] = {}

            def timed(run: Callable[[], object]) -> float:
                start = time.perf_counter()
                run()
                return time.perf_counter() - start

            def ours(name: str, tokens: list[int] = tokens, logits: dict[str, Any] = logits) -> float:
                engine = engines[name]
                return timed(lambda: logits.update({name: engine.forward(tokens, engine.new_cache())}))

            def llama(length: int = length) -> float:
                assert peer.stdin is not None
                assert peer.stdout is not None
                print(length, file=peer.stdin, flush=True)
                return float(peer.stdout.readline())

            def sgemm(x: Any = x, w: Any = w) -> float:
                return timed(lambda: x @ w.T)

            sides: dict[str, Callable[[], float]] = {name: lambda name=name: ours(name) for name in engines}
            sides |= {"llama.cpp": llama, "sgemm": sgemm}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for run in sides.values():
                run()
            for _ in range(arguments.rounds):
                for name in (*sides, *reversed(sides)):
                    times[name].append(sides[name]())
            rates = {name: [length * operations / seconds for seconds in times[name]] for name in sides}
            rates["sgemm"] = [2 * length * _SGEMM**2 / seconds for seconds in times["sgemm"]]
            exact = logits.get("auto")
            for name in sides:
                speeds = [rate / operations for rate in rates[name]]
                interval = median_interval(speeds)
                shown = f"{median(speeds):.0f}" + (f" [{interval[0]:.0f}, {interval[1]:.0f}]" if interval else "")
                same = np.linalg.norm(logits[name] - exact) / np.linalg.norm(exact) if name in logits else None
                cells = (
                    str(length),
                    f"flashmoe_mlx, activations={name}" if name in engines else name,
                    shown if name != "sgemm" else "-",
                    f"{median(rates[name]) / 1e9:.0f}",
                    f"{median(rates[name]) / median(rates['sgemm']):.2f}",
                    f"{median(rates[name]) / median(rates['llama.cpp']):.2f}" if name != "sgemm" else "-",
                    "-" if same is None or name == "auto" else f"{same:.1e}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)
        assert peer.stdin is not None
        peer.stdin.close()


def _operations_per_token(sizes: dict[str, Any]) -> int:
    """Return the multiplications and additions of all products with matrices for one token."""
    hidden, heads, kv_heads, dim = (sizes[name] for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"))
    key = sizes["linear_key_heads"] * sizes["linear_key_dim"]
    value_heads, value = sizes["linear_value_heads"], sizes["linear_value_heads"] * sizes["linear_value_dim"]
    attention = hidden * (3 * heads * dim + 2 * kv_heads * dim)
    linear = hidden * (2 * key + 3 * value + 2 * value_heads)
    inner = EXPERTS_PER_TOKEN * sizes["expert_size"] + sizes["shared_expert_size"]
    experts = hidden * (3 * inner + sizes["num_experts"] + 1)
    layers = sizes["num_layers"]
    return 2 * (layers // 4 * attention + (layers - layers // 4) * linear + layers * experts)


def _prompt(length: int) -> list[int]:
    return [random.Random(number).randrange(256) for number in range(length)]  # noqa: S311


def _start_peer(arguments: argparse.Namespace, side: str) -> subprocess.Popen[str]:
    options = ["--layers", arguments.layers, "--experts", arguments.experts, "--folder", arguments.folder]
    options += ["--lengths", arguments.lengths, "--sizes", json.dumps(arguments.sizes), "--side", side]
    command = [arguments.peer, __file__, *map(str, options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603


def _serve_peer(arguments: argparse.Namespace) -> None:
    """Read lengths from the standard input; print the seconds that llama.cpp needs for each prompt."""
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    most = max(int(length) for length in arguments.lengths.split(","))
    options = {"n_ctx": most + 8, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llama = llama_cpp.Llama(str(gguf_path(arguments)), logits_all=False, **options)
    for line in sys.stdin:
        llama.reset()
        start = time.perf_counter()
        llama.eval(_prompt(int(line)))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
