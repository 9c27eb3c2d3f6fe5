"""Compare the speed of two checkouts of this package, run alternately, on the same model and machine.

    python tools/compare_versions.py ../before . --model flashmoe_mlx/made_models/demo_model --rounds 4

Each round runs the checkouts in the order A B B A, each run in a separate process: load, one answer that is not
counted, then a prompt and ``--tokens`` decode steps. Prints the percentiles of a decode step in milliseconds, the time
to the first token, and the ratio B / A of the medians of each round with a 95% interval.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

_CHILD = """
import json, sys, time
import flashmoe_mlx
options = json.loads(sys.argv[1])
with flashmoe_mlx.load(options["model"], options["backend"], options["experts_k"]) as engine:
    def answer(tokens):
        pieces = engine.generate(
            "x" * options["prompt"], raw=True, temperature=0, max_tokens=tokens, ignore_eos=True
        )
        for _ in pieces: pass
        return pieces.metrics
    answer(8)
    metrics = answer(options["tokens"])
    print(json.dumps({"steps": metrics.decode.steps, "first": metrics.time_to_first_token}))
"""


def measure(checkout: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run one process of ``checkout``; return the seconds of its decode steps and of its first token."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-c", _CHILD, json.dumps(options)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="checkout A")
    parser.add_argument("second", type=Path, help="checkout B")
    parser.add_argument("--model", type=Path, required=True, help="folder of a pack that both can open")
    parser.add_argument("--backend", default="pread")
    parser.add_argument("--experts-k", type=int)
    parser.add_argument("--prompt", type=int, default=64, help="characters of the prompt")
    parser.add_argument("--tokens", type=int, default=100, help="decode steps of a run, and one")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    options = {
        "model": str(given.model.resolve()),
        "backend": given.backend,
        "experts_k": given.experts_k,
        "prompt": given.prompt,
        "tokens": given.tokens + 1,
    }
    runs: dict[Path, list[dict[str, Any]]] = {given.first: [], given.second: []}
    for _ in range(given.rounds):
        for checkout in (given.first, given.second, given.second, given.first):
            runs[checkout].append(measure(checkout, options))
    for checkout, results in runs.items():
        steps = np.percentile([1e3 * step for result in results for step in result["steps"]], [5, 50, 95])
        first = np.median([1e3 * result["first"] for result in results])
        print(
            f"{checkout}: decode ms p5/p50/p95 {'/'.join(f'{step:.3f}' for step in steps)}, first token {first:.1f} ms"
        )
    for what, values in (("decode", lambda run: np.median(run["steps"])), ("first token", lambda run: run["first"])):
        first, second = (np.array([values(run) for run in runs[checkout]]) for checkout in (given.first, given.second))
        logs = np.log(second.reshape(-1, 2).mean(axis=1) / first.reshape(-1, 2).mean(axis=1))
        error = 1.96 * logs.std(ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
        low, middle, high = np.exp(logs.mean() + np.array([-error, 0, error]))
        print(f"{what}: B / A {middle:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
