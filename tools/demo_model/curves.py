"""Plot the log of a training run: losses, held-out answers, use of the experts.

python tools/demo_model/curves.py DIR/log.jsonl PNG        # needs flashmoe_mlx with its extra `research`
"""

import json
import sys
from pathlib import Path
from typing import Any

from flashmoe_mlx.research.figures import new_figure, save


def main() -> None:
    """Plot the log."""
    log, target = map(Path, sys.argv[1:])
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    examined = [line for line in lines if line["kind"] == "held_out"]
    figure, (losses, answers, use) = new_figure(13, 3.6, columns=3)
    for axes, title, names in (
        (losses, "training loss, nats a token", {"own_loss": "answers and texts", "prompt_loss": "prompts"}),
        (use, "use of experts, of uniform", {"least_used": "least used", "most_used": "most used"}),
    ):
        for name, label in names.items():
            axes.plot([line["step"] for line in steps], [line[name] for line in steps], label=label)
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
    losses.set_ylim(0, 1)
    for kind in [name for name, value in examined[0].items() if isinstance(value, dict) and name != "text"]:
        shares = [100 * line[kind]["exact"] for line in examined]
        answers.plot([line["step"] for line in examined], shares, "o-", markersize=3, label=kind)
    answers.set(title="held-out answers right, %", xlabel="step")
    answers.legend(frameon=False, fontsize="small")
    save(figure, target)


if __name__ == "__main__":
    main()
