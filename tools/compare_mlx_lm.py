"""Compare decode speed with mlx-lm on the same weights, all of them in memory.

    pip install 'flashmoe_mlx[oracle]'
    python tools/compare_mlx_lm.py --layers 16 --experts 64 --k 10 4 --folder /tmp/compare

Both engines run in one process, in the order A B B A, on a pack with random weights and the geometry of the 397B. Both
decode greedily after the same random prompt, mlx-lm with its own ``generate_step``. A round counts the mean time of a
token, without the first ``--skip`` tokens; the table shows the median of the rounds and its 95 % interval. Tokens of
the two engines agree as far as rounding lets them: all of them in f32, on a CPU. ``--tiny`` compares a small model.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import flashmoe_mlx
from flashmoe_mlx.custom_kernels.precision import activation_type
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Status
from flashmoe_mlx.made_models.synthetic import synthetic_pack
from flashmoe_mlx.pack.opening import Pack
from flashmoe_mlx.research.estimate.probe_models import SIZES
from flashmoe_mlx.research.intervals import format_interval, median_interval

TINY = replace(
    SIZES["large"],
    hidden_size=128,
    num_experts=16,
    experts_per_token=4,
    expert_size=128,
    shared_expert_size=128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    linear_key_heads=1,
    linear_value_heads=4,
    linear_key_dim=32,
    linear_value_dim=32,
)

Decode = Callable[[list[int], int], Iterator[int]]
"""Generates at most so many tokens after a prompt, greedily."""


@dataclass
class Rounds:
    """Measurements of one engine: the seconds of every token in each round, and the tokens of the last round."""

    seconds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def milliseconds(self, skip: int) -> list[float]:
        """Return the mean time of a token in each round, without the first ``skip`` tokens."""
        return [1e3 * sum(seconds[skip:]) / len(seconds[skip:]) for seconds in self.seconds]


def main() -> None:
    """Make the pack if it does not exist, run the rounds, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 4], help="routed experts of a token")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a round")
    parser.add_argument("--skip", type=int, default=16, help="first tokens of a round that do not count")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds of A B B A")
    parser.add_argument("--folder", type=Path, default=Path("compare-mlx-lm"))
    parser.add_argument("--tiny", action="store_true", help="a small model, for a trial of this tool")
    arguments = parser.parse_args()
    large = replace(SIZES["large"], num_layers=arguments.layers, num_experts=arguments.experts)
    sizes = TINY if arguments.tiny else large
    pack = synthetic_pack("compare", sizes, arguments.folder)
    print("| | K | ms a token | p5 / p50 / p95 of tokens | first token, ms |\n| - | - | - | - | - |")
    for k in arguments.k:
        found = compare(pack, k, arguments.prompt, arguments.tokens, arguments.rounds)
        for name, rounds in found.items():
            means = rounds.milliseconds(arguments.skip)
            tokens = [1e3 * second for seconds in rounds.seconds for second in seconds[arguments.skip :]]
            low, middle, high = np.percentile(tokens, (5, 50, 95))
            interval = format_interval(median_interval(means))
            first = " ".join(f"{1e3 * seconds[0]:.0f}" for seconds in rounds.seconds[:2])
            print(f"| {name} | {k} | {median(means):.3f}{interval} | {low:.2f} / {middle:.2f} / {high:.2f} | {first} |")
        print(f"\nK={k}: {equal_tokens(found)} of {arguments.tokens} tokens are equal.\n", flush=True)


def compare(pack: Pack, k: int, prompt: int, tokens: int, rounds: int) -> dict[str, Rounds]:
    """Decode with both engines in turns; see the module."""
    chosen = random.Random(0)  # noqa: S311
    prompt_ids = [chosen.randrange(pack.config.vocab_size) for _ in range(prompt)]
    with flashmoe_mlx.load(pack.folder, backend="resident", experts_k=k, prompt_cache_gib=0) as engine:
        engines = {"flashmoe_mlx": our_decode(engine), "mlx-lm": peer_decode(peer_model(pack, k))}
        found = {name: Rounds() for name in engines}
        for name, decode in engines.items():  # compilation does not count
            print(f"<!-- {name}: {_timed(decode, prompt_ids, 4)[0][0]:.2f} s to the first token ever -->", flush=True)
        for turn in range(rounds):
            for name in list(engines) if turn % 2 == 0 else list(reversed(engines)):
                seconds, generated = _timed(engines[name], prompt_ids, tokens)
                found[name].seconds.append(seconds)
                found[name].tokens = generated
    return found


def equal_tokens(found: dict[str, Rounds]) -> int:
    """Return the number of tokens before the first on which the engines differ."""
    pairs = zip(*(rounds.tokens for rounds in found.values()), strict=True)
    return len(list(takewhile(lambda pair: len(set(pair)) == 1, pairs)))


def our_decode(engine: Engine) -> Decode:
    """Return what decodes with ``engine``."""

    def decode(prompt: list[int], count: int) -> Iterator[int]:
        request = Request(prompt, ChosenSampling(SamplingOptions()), max_tokens=count)
        runner = engine.runner
        sequence = runner.begin(request)
        with runner.exclusive():
            runner.prefill(sequence)
            yield sequence.token_ids[-1]
            while sequence.status is Status.DECODING:
                runner.decode([sequence])
                yield sequence.token_ids[-1]

    return decode


def peer_decode(model: nn.Module) -> Decode:
    """Return what decodes with ``model`` of mlx-lm."""
    from mlx_lm.generate import generate_step

    def decode(prompt: list[int], count: int) -> Iterator[int]:
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
            yield int(token)

    return decode


def peer_model(pack: Pack, k: int) -> nn.Module:
    """Build mlx-lm's model with the weights of ``pack`` and ``k`` routed experts."""
    from mlx_lm.models import qwen3_5_moe

    config = json.loads((pack.folder / "config.json").read_text())
    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(config))
    weights = {f"language_model.{name}": array for name, array in _all_tensors(pack)}

    def quantization(name: str, _: nn.Module) -> bool | dict[str, Any]:
        if f"{name}.scales" not in weights:
            return False
        groups = weights[f"{name}.scales"].shape[-1] * 64
        return {"group_size": 64, "bits": weights[f"{name}.weight"].shape[-1] * 32 // groups}

    nn.quantize(model, class_predicate=quantization)
    model.load_weights(list(weights.items()))
    model.set_dtype(activation_type())
    for layer in model.language_model.model.layers:
        layer.mlp.top_k = k
    model.eval()
    mx.eval(model.parameters())
    return model


def _all_tensors(pack: Pack) -> Iterator[tuple[str, mx.array]]:
    yield from mx.load(str(pack.resident_path)).items()
    experts = max(pack.experts.values(), key=lambda variant: variant.layout.code_bits)
    for layer in range(experts.num_layers):
        records = np.memmap(experts.layer_path(layer), np.uint8, "r").reshape(experts.num_experts, -1)
        for name, array in stacked(records, experts.layout[layer]):
            yield f"model.layers.{layer}.mlp.switch_mlp.{name}", array


def stacked(records: np.ndarray, layout: RecordLayout) -> Iterator[tuple[str, mx.array]]:
    """Yield the components of ``records``, uint8 [experts, record bytes], as tensors [experts, ...]."""
    for component in layout.components:
        projection, part = component.name.split(".")
        chosen = np.ascontiguousarray(records[:, component.offset : component.offset + component.nbytes])
        words = mx.array(chosen).view(mx.uint32 if part == "weight" else mx.bfloat16)
        yield f"{projection}_proj.{part}", words.reshape(len(records), *component.shape)


def _timed(decode: Decode, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
    """Return the seconds before each token, and the tokens."""
    tokens, times = [], [time.perf_counter()]
    for token in decode(prompt, count):
        times.append(time.perf_counter())
        tokens.append(token)
    return np.diff(times).tolist(), tokens


if __name__ == "__main__":
    main()
