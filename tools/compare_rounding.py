"""Compare the rounding errors of decoding with those of mlx-lm, on the same weights and the same tokens.

    pip install 'flashmoe_mlx[oracle]'
    MLX_ENABLE_TF32=0 python tools/compare_rounding.py --layers 16 --experts 64 --k 10 4 --folder /tmp/compare

On a GPU both engines compute in bf16, so their answers part as soon as two tokens have almost equal logits. The
references in f32 are the truth. They generate tokens greedily after a random prompt; both engines receive the same
tokens, one at a time. The table shows the error of the logits of a step, ||logits - truth|| / ||truth||, and the number
of steps in which the largest logit belongs to the same token.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from compare_mlx_lm import TINY, peer_model

import flashmoe_mlx
from flashmoe_mlx import engine as engine_module
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.pack.opening import Pack
from flashmoe_mlx.research.estimate.probe_models import SIZES

Logits = npt.NDArray[np.float32]
Forward = Callable[[Sequence[int]], Logits]
"""Appends tokens to a sequence and returns the logits of the last of them."""


def main() -> None:
    """Make the pack if it does not exist, run both engines and the references, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 4], help="routed experts of a token")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="steps to compare")
    parser.add_argument("--folder", type=Path, default=Path("compare-mlx-lm"))
    parser.add_argument("--tiny", action="store_true", help="a small model, for a trial of this tool")
    arguments = parser.parse_args()
    large = replace(SIZES["large"], num_layers=arguments.layers, num_experts=arguments.experts)
    pack = synthetic_pack("compare", TINY if arguments.tiny else large, arguments.folder)
    print("| | K | error of a step, median (5 %, 95 %) | same largest logit |\n| - | - | - | - |")
    for k in arguments.k:
        truth, tokens = truth_of(pack, k, arguments.prompt, arguments.tokens)
        for name, found in answers(pack, k, tokens).items():
            errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, truth, strict=True)]
            low, middle, high = np.percentile(errors, (5, 50, 95))
            same = sum(int(a.argmax() == b.argmax()) for a, b in zip(found, truth, strict=True))
            print(f"| {name} | {k} | {middle:.4f} ({low:.4f}, {high:.4f}) | {same} of {len(truth)} |", flush=True)


def truth_of(pack: Pack, k: int, prompt: int, count: int) -> tuple[list[Logits], list[list[int]]]:
    """Return the logits of ``count`` steps by the references in f32, and the tokens of the prompt and of each step."""
    chosen = random.Random(0)  # noqa: S311
    tokens = [[chosen.randrange(pack.config.vocab_size) for _ in range(prompt)]]
    truth: list[Logits] = []
    own, engine_module.activation_type = engine_module.activation_type, lambda: mx.float32
    try:
        with flashmoe_mlx.load(
            pack.folder, backend="resident", experts_k=k, kernels="reference", prompt_cache_gib=0
        ) as engine:
            cache = engine.new_cache()
            for _ in range(count):
                truth.append(np.asarray(engine.forward(tokens[-1], cache), np.float32)[-1])
                tokens.append([int(truth[-1].argmax())])
    finally:
        engine_module.activation_type = own
    return truth, tokens[:-1]


def answers(pack: Pack, k: int, tokens: list[list[int]]) -> dict[str, list[Logits]]:
    """Return the logits of both engines after the prompt and after each further token."""
    from mlx_lm.models.cache import make_prompt_cache

    found: dict[str, list[Logits]] = {}
    with flashmoe_mlx.load(pack.folder, backend="resident", experts_k=k, prompt_cache_gib=0) as engine:
        cache = engine.new_cache()
        found["flashmoe_mlx"] = [np.asarray(engine.forward(part, cache), np.float32)[-1] for part in tokens]
    model = peer_model(pack, k)
    states = make_prompt_cache(model)
    found["mlx-lm"] = []
    for part in tokens:
        logits = model(mx.array(part)[None], cache=states)[0, -1].astype(mx.float32)
        found["mlx-lm"].append(np.array(logits))
    return found


if __name__ == "__main__":
    main()
