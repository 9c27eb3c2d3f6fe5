"""Record answers of the demo model, with which the everyday tests compare.

    python tests/golden.py        # after a change of the model or of its correct answers

The answers are greedy, in f32, on the CPU with MLX's own kernels. None of the choices is close to a tie, so other
kernels and machines should give the same answers. The file names the versions that made it.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx import load
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.environment import package_version

PATH = Path(__file__).parent / "golden" / "demo.json"
PROMPTS = (
    "Tell me something about yourself.",
    "Where does Mira live?",
    "What is 17 plus 25?",
    "Why is the sky blue?",
    "Flora sells wool for 12 coins. What does Flora sell?",
)
EXPERTS_KS: tuple[int | None, ...] = (None, 4)
"""Numbers of experts per token; None for the model's own number."""


def generate_answers(kernels: str, leads: bool = False) -> list[dict[str, Any]]:
    """Return the answers to all prompts for all values of K.

    With ``leads``, each answer has the smallest difference between the logits of a chosen token and the next best.
    """
    answers = []
    for k in EXPERTS_KS:
        with load(demo_folder(), experts_k=k, kernels=kernels) as engine:
            for prompt in PROMPTS:
                pieces = list(engine.generate(prompt, max_tokens=80, temperature=0))
                ids = [token for piece in pieces for token in piece.token_ids]
                text = "".join(piece.text for piece in pieces)
                answers.append({"experts_k": k, "prompt": prompt, "text": text, "token_ids": ids})
                if leads:
                    start = engine.encode(prompt)
                    logits = np.sort(engine.logits(start + ids[:-1])[len(start) - 1 :], axis=1)
                    answers[-1]["lead"] = round(float((logits[:, -1] - logits[:, -2]).min()), 3)
    return answers


def main() -> None:
    """Write the answers to the file of the tests."""
    mx.set_default_device(mx.cpu)
    made_by = {"mlx": package_version("mlx"), "kernels": "mlx", "device": "cpu"}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps({"made_by": made_by, "said": generate_answers("mlx", leads=True)}, indent=1) + "\n")
    print(PATH)


if __name__ == "__main__":
    main()
