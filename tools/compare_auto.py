"""Compare ``backend=auto`` with settings chosen by hand, on one model and with a given memory.

    python tools/compare_auto.py <pack> --memory-gib 4 --probe <folder>/probe.json

The speed model makes the choice from the measurements in ``--probe``; if that file does not exist, this tool measures
the machine first. Results of ``task=tune`` are not used. The other settings are the candidates of ``task=tune``. They
run in turns, each after another prompt, and in reverse order in every second round. Memory is limited by a control
group with the page cache of this process, or by a ballast.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from statistics import median

from flashmoe_mlx.console.output import show
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.research.bench.engine_bench import Configuration, Plan, Trial, find_unavailable, run_trials
from flashmoe_mlx.research.bench.engine_summary import summarize
from flashmoe_mlx.research.bench.memory_cap import memory_cap
from flashmoe_mlx.research.estimate.automatic import choose_backend, room_for_experts
from flashmoe_mlx.research.estimate.machine_profile import MachineProfile
from flashmoe_mlx.research.estimate.probe import probe
from flashmoe_mlx.research.intervals import format_interval
from flashmoe_mlx.research.tuning import candidates
from flashmoe_mlx.stores.memory import GIB

PROMPTS = ("How does a hash table find a key?", "Write four lines about a lighthouse in winter.")


def main() -> None:
    """Choose, run, and print a table in Markdown, the fastest configuration first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--memory-gib", type=float, required=True, help="memory of the run")
    parser.add_argument("--probe", type=Path, required=True, help="file with the measurements of this machine")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of settings to run")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="time after which no trial begins")
    arguments = parser.parse_args()
    profile = MachineProfile.load(arguments.probe)
    if profile is None:
        profile = probe(arguments.probe.parent, 90, show)
        profile.save(arguments.probe)
    files = open_model(arguments.pack)
    memory = int(arguments.memory_gib * GIB)
    made = choose_backend(files, profile, memory)
    expected = f"{made.estimate.backend}, prefetch={made.prefetch}, {made.estimate.tokens_per_second:.3g} tok/s"
    room, size = room_for_experts(files, memory)
    by_hand = candidates(None, None, size, room)
    wanted = arguments.only.split(",")
    settings = [
        Configuration("auto", made.settings, None, made.prefetch),
        *(setting for setting in by_hand if any(part in setting.label for part in wanted)),
    ]
    plan = Plan(arguments.pack, settings, ["rotating"], PROMPTS, True, arguments.tokens, arguments.rounds, "auto")
    trials: list[Trial] = []
    with memory_cap(arguments.memory_gib) as cap:
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
