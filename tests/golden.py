"""What the demo model says, recorded; the everyday tests compare with it.

    python tests/golden.py        # record anew: after a change of the model, or of what is right

Greedy answers in f32 on the CPU by MLX's own kernels. Logits are near ties nowhere in them, so that other kernels and
machines should say the same; the file tells which made it.
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
SETTINGS: tuple[int | None, ...] = (None, 4)
"""Values of ``experts_k``."""


def said(kernels: str, leads: bool = False) -> list[dict[str, Any]]:
    """Answers to every prompt in every setting; with the smallest lead of a chosen token's logit over the next."""
    found = []
    for k in SETTINGS:
        with load(demo_folder(), experts_k=k, kernels=kernels) as engine:
            for prompt in PROMPTS:
                pieces = list(engine.generate(prompt, max_tokens=80, temperature=0))
                ids = [token for piece in pieces for token in piece.token_ids]
                text = "".join(piece.text for piece in pieces)
                found.append({"experts_k": k, "prompt": prompt, "text": text, "token_ids": ids})
                if leads:
                    start = engine.encode(prompt)
                    logits = np.sort(engine.logits(start + ids[:-1])[len(start) - 1 :], axis=1)
                    found[-1]["lead"] = round(float((logits[:, -1] - logits[:, -2]).min()), 3)
    return found


def main() -> None:
    """Record."""
    mx.set_default_device(mx.cpu)
    made_by = {"mlx": package_version("mlx"), "kernels": "mlx", "device": "cpu"}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps({"made_by": made_by, "said": said("mlx", leads=True)}, indent=1) + "\n")
    print(PATH)


if __name__ == "__main__":
    main()
