"""Compare ``backend=auto`` with settings chosen by hand, on models of three sizes, each with a given memory.

    python tools/compare_auto.py --folder <folder> --probe <folder>/probe.json
    python tools/compare_auto.py --folder <folder> --probe <folder>/probe.json --only-model far
    python tools/compare_auto.py --pack <pack> --memory-gib 4 --probe <folder>/probe.json

Synthetic packs of the 397B's geometry are made in ``--folder``: one fits into the memory, one does not, and one is far
too large.
The speed model makes the choice from the measurements in ``--probe``; if that file does not exist, this tool measures
the machine first. Results of ``task=tune`` are not used. The other settings are the candidates of ``task=tune``. They
run in turns, each after another prompt, and in reverse order in every second round. Memory is limited by a control
group with the page cache of this process, or by a ballast.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

from flashmoe_mlx.console.output import show
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial, find_unavailable, run_trials
from flashmoe_mlx.research.bench.engine_summary import summarize
from flashmoe_mlx.research.bench.memory_cap import memory_cap
from flashmoe_mlx.research.estimate.automatic import choose_backend, room_for_experts
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.probe import probe
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.intervals import format_interval
from flashmoe_mlx.research.tuning import candidates
from flashmoe_mlx.stores.memory import GIB

PROMPTS = ("How does a hash table find a key?", "Write four lines about a lighthouse in winter.")


MODELS = {
    "fits": (replace(SIZES["large"], bits=2, num_experts=96), 6.0),
    "half": (replace(SIZES["large"], num_experts=128), 3.5),
    "far": (replace(SIZES["large"], num_layers=8, num_experts=256, experts_per_token=4), 3.0),
}
"""The sizes of each model, and the memory of its runs in GiB."""


def main() -> None:
    """Choose, run, and print a table in Markdown for each model, the fastest configuration first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the packs of three sizes")
    parser.add_argument("--only-model", choices=list(MODELS), help="run one of the three sizes")
    parser.add_argument("--pack", type=Path, help="run this pack alone")
    parser.add_argument("--memory-gib", type=float, help="memory of the run with --pack")
    parser.add_argument("--probe", type=Path, required=True, help="file with the measurements of this machine")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of settings to run")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="time after which no trial of a model begins")
    arguments = parser.parse_args()
    if arguments.pack is not None:
        _compare(arguments.pack, arguments.memory_gib, arguments)
        return
    for name, (sizes, memory) in MODELS.items():
        if arguments.only_model in (None, name):
            _compare(synthetic_pack(name, sizes, arguments.folder).folder, memory, arguments)


def _compare(pack: Path, memory_gib: float, arguments: argparse.Namespace) -> None:
    """Run all settings on one pack and print the table."""
    profile = MachineProfile.load(arguments.probe)
    if profile is None:
        profile = probe(arguments.probe.parent, 90, show)
        profile.save(arguments.probe)
    files = open_model(pack)
    memory = int(memory_gib * GIB)
    made = choose_backend(files, profile, memory)
    expected = f"{made.estimate.backend}, prefetch={made.prefetch}, {made.estimate.tokens_per_second:.3g} tok/s"
    room, size = room_for_experts(files, memory)
    by_hand = candidates(None, None, size, room)
    wanted = arguments.only.split(",")
    settings = [
        Configuration("auto", made.settings, None, made.prefetch),
        *(setting for setting in by_hand if any(part in setting.label for part in wanted)),
    ]
    plan = Plan(pack, settings, ["rotating"], PROMPTS, True, arguments.tokens, arguments.rounds, "auto")
    trials: list[Trial] = []
    with memory_cap(memory_gib) as cap:
        left_out = find_unavailable(plan)
        failures: dict[str, str] = dict(left_out)
        end = time.monotonic() + arguments.seconds
        for trial in run_trials(plan, [], str, failures):
            trials.append(trial)
            if time.monotonic() > end:
                break
    complete = Counter(trial.round for trial in trials)
    trials = [trial for trial in trials if complete[trial.round] == complete[0]]
    print(f"{size / 1e9:.1f} GB of experts, {cap}; auto: {expected} expected\n")
    print("| configuration | tok/s, rounds | median | times auto | hits | MB per token |\n|---|---|---|---|---|---|")
    summaries = {summary.setting: summary for summary in summarize(trials)}
    for summary in sorted(summaries.values(), key=lambda summary: -summary.tokens_per_second):
        rates = [trial.rate for trial in trials if trial.setting == summary.setting]
        hits = "-" if summary.hit_rate is None else f"{summary.hit_rate:.0%}"
        print(
            f"| {summary.setting} | {' '.join(f'{rate:.2f}' for rate in rates)} | {median(rates):.2f} | "
            f"{summary.ratio:.3f}{format_interval(summary.ratio_interval)} | {hits} | "
            f"{summary.bytes_per_token / 1e6:.0f} |"
        )
    for name, reason in failures.items():
        print(f"\n{name}: {reason}")


if __name__ == "__main__":
    main()
