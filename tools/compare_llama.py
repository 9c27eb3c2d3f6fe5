"""Compare decode speed with llama.cpp on models with random weights and the geometry of the 397B.

    python -m venv peer && peer/bin/pip install llama-cpp-python gguf numpy      # builds llama.cpp: minutes
    python tools/compare_llama.py --peer peer/bin/python --layers 4 --experts 64 --folder /tmp/compare

Both programs run K=4 with the same sizes and a vocabulary of about 260, on the cores available to this process.
flashmoe_mlx uses 4 bits in groups of 64 (4.5 bits per weight), llama.cpp uses Q4_K (4.5 bits). Each process decodes
``--tokens`` random tokens per round, and the processes run in the order A B B A. With fewer experts than 512 the models
take less space; a token still reads K experts in each layer. The weights differ, so only times are compared. Random
tokens choose different experts at each step.

Without ``--cold``, 8 tokens are decoded before timing starts. With ``--cold``, the files of both models are evicted
from the page cache before each process, all tokens and the time to open the model count, and the first and the last
tokens are also shown separately. ``--options`` are options of the backend; ``--prefetch`` is an option of the engine:

    python tools/compare_llama.py --peer peer/bin/python --layers 8 --experts 512 --cold --tokens 300 --rounds 1 \
        --backend ram_hybrid --options budget_gib=20,reader=io_uring,direct=true
"""

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

EXPERTS_PER_TOKEN = 4
_WARM_UP = 8
_FIRST, _LAST = 60, 100


def main() -> None:
    """Write the models that do not exist yet, run the rounds, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="path of a Python interpreter with llama-cpp-python and gguf")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--backend", default="mmap")
    parser.add_argument("--options", default="", help="options of the backend: name=value,name=value")
    parser.add_argument("--prefetch", default="none")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds")
    parser.add_argument("--order", default="ABBA", help="processes of a round: A is flashmoe_mlx, B llama.cpp")
    parser.add_argument("--cold", action="store_true", help="evict the page cache before each process")
    parser.add_argument("--folder", type=Path, default=Path("compare-llama"))
    parser.add_argument("--side", choices=("ours", "peer", "write"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": _ours, "peer": _peer, "write": write_gguf}[arguments.side](arguments)))
        return
    if not arguments.peer:
        parser.error("--peer is needed")
    from flashmoe_mlx.research.estimate.probe_models import SIZES
    from flashmoe_mlx.stores.page_cache import cached_bytes, evict

    sizes = replace(
        SIZES["large"], num_layers=arguments.layers, num_experts=arguments.experts, experts_per_token=EXPERTS_PER_TOKEN
    )
    arguments.sizes = asdict(sizes)  # the peer's interpreter has no flashmoe_mlx

    _run(arguments, "ours", only_make=True)
    if not gguf_path(arguments).exists():
        _run(arguments, "write")
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for side in [{"A": "ours", "B": "peer"}[letter] for letter in arguments.order * arguments.rounds]:
        if arguments.cold:
            evict(path for path in arguments.folder.rglob("*") if path.is_file())
            # The host of a virtual machine may reclaim free memory and return it slowly (2026-11-25-cold.md). Touch the
            # memory first, in a separate process that frees it again.
            touch = (
                "from flashmoe_mlx.stores.allocation import allocate_huge_pages\n"
                "from flashmoe_mlx.stores.memory import GIB, available_memory\n"
                "allocate_huge_pages(available_memory() - GIB)"
            )
            subprocess.run([sys.executable, "-c", touch], check=True)  # noqa: S603
        result = _run(arguments, side)
        if arguments.cold and side == "peer":
            result["note"] += (
                f", {cached_bytes(gguf_path(arguments)) / 1e9:.1f} GB of its file in the page cache at the end"
            )
        results[side].append(result)
        print(
            f"{side}: open after {result['open']:.1f} s, median {median(result['ms']):.1f} ms per token, "
            f"peak memory {result['peak'] / 1e9:.1f} GB; {result['note']}",
            file=sys.stderr,
        )
    spans = {"all": slice(None)}
    if arguments.cold and arguments.tokens >= _FIRST + _LAST:
        spans |= {f"first {_FIRST}": slice(_FIRST), f"last {_LAST}": slice(-_LAST, None)}
    print("| | tokens | ms per token: p5 / p50 / p95 | mean | medians of the rounds |\n|---|---|---|---|---|")
    for span, part in spans.items():
        for side, title in (("ours", f"flashmoe_mlx, {arguments.backend}"), ("peer", "llama.cpp, mmap")):
            rounds = [result["ms"][part] for result in results[side]]
            times = sorted(ms for round_times in rounds for ms in round_times)
            low, middle, high = (times[int(share * (len(times) - 1))] for share in (0.05, 0.5, 0.95))
            medians = ", ".join(f"{median(round_times):.1f}" for round_times in rounds)
            mean = sum(times) / len(times)
            print(f"| {title} | {span} | {low:.1f} / {middle:.1f} / {high:.1f} | {mean:.1f} | {medians} |")
    if arguments.cold:
        for side, title in (("ours", "flashmoe_mlx"), ("peer", "llama.cpp")):
            opened = ", ".join(f"{result['open']:.1f}" for result in results[side])
            ended = ", ".join(f"{result['open'] + sum(result['ms']) / 1e3:.1f}" for result in results[side])
            print(f"{title}: open after {opened} s, all {arguments.tokens} tokens after {ended} s")


def _run(arguments: argparse.Namespace, side: str, only_make: bool = False) -> Any:
    """Run this script for one side in a separate process; return the result that it prints."""
    python = sys.executable if side == "ours" else arguments.peer
    options = ["--layers", arguments.layers, "--experts", arguments.experts, "--backend", arguments.backend]
    options += ["--tokens", 0 if only_make else arguments.tokens, "--folder", arguments.folder, "--side", side]
    options += ["--options", arguments.options, "--prefetch", arguments.prefetch, *["--cold"] * arguments.cold]
    options += ["--sizes", json.dumps(arguments.sizes)]
    done = subprocess.run([python, __file__, *map(str, options)], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def _time_tokens(arguments: argparse.Namespace, step: Callable[[int], object]) -> list[float]:
    """Return the milliseconds of each token after the warm-up."""
    times, warm_up = [], 0 if arguments.cold else _WARM_UP
    for number in range(arguments.tokens + warm_up):
        token = random.Random(number).randrange(256)  # noqa: S311
        start = time.perf_counter()
        step(token)
        times.append(1e3 * (time.perf_counter() - start))
    return times[warm_up:]


def _peak() -> int:
    """Return the peak resident size of this process in bytes, mapped files included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure flashmoe_mlx; with 0 tokens, only make the model."""
    import mlx.core as mx
    import yaml

    import flashmoe_mlx
    from flashmoe_mlx.made_models.synthetic import synthetic_pack
    from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes

    mx.set_default_device(mx.cpu)
    pack = synthetic_pack("compare", SyntheticSizes(**arguments.sizes), arguments.folder).folder
    if not arguments.tokens:
        return {}
    options = dict(option.split("=", 1) for option in filter(None, arguments.options.split(",")))
    parsed = {name: yaml.safe_load(value) for name, value in options.items()}
    start = time.perf_counter()
    with flashmoe_mlx.load(
        pack, arguments.backend, prefetch=arguments.prefetch, **parsed, prompt_cache_gib=0
    ) as engine:
        opened, cache = time.perf_counter() - start, engine.new_cache()
        times = _time_tokens(arguments, lambda token: engine.forward([token], cache))
        stats = engine.store.stats()
        experts = {
            runs for path, runs in engine.setup["kernels"].items() if path.startswith("routed_experts: one token")
        }
        note = f"{', '.join(experts)}, hits {stats.hits / max(1, stats.requests):.0%}"
        return {"ms": times, "open": opened, "peak": _peak(), "note": note}


def gguf_path(arguments: argparse.Namespace) -> Path:
    """Return the path of the model for llama.cpp."""
    folder: Path = arguments.folder
    return folder / f"compare-{arguments.layers}-{arguments.experts}.gguf"


def _peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure llama.cpp."""
    import llama_cpp

    if arguments.cold:
        # Otherwise llama.cpp rearranges the weights into a copy, which does not fit into memory.
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def without_copy() -> Any:
            parameters = defaults()
            parameters.use_extra_bufts = False
            return parameters

        llama_cpp.llama_cpp.llama_model_default_params = without_copy
    start = time.perf_counter()
    llama = llama_cpp.Llama(
        str(gguf_path(arguments)), n_ctx=512, n_threads=len(os.sched_getaffinity(0)), verbose=False, logits_all=False
    )
    opened = time.perf_counter() - start
    times = _time_tokens(arguments, lambda token: llama.eval([token]))
    note = llama_cpp.llama_print_system_info().decode().split("|")[0]
    return {"ms": times, "open": opened, "peak": _peak(), "note": note}


def write_gguf(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a model of random Q4_K weights. Norms, and other tensors that llama.cpp keeps in f32, are f32."""
    import gguf
    import numpy as np

    path = gguf_path(arguments)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen35moe")
    sizes = arguments.sizes
    layers, hidden, vocabulary = arguments.layers, sizes["hidden_size"], 256 + 4
    heads, kv_heads, dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    key = sizes["linear_key_heads"] * sizes["linear_key_dim"]
    value_heads, value = sizes["linear_value_heads"], sizes["linear_value_heads"] * sizes["linear_value_dim"]
    writer.add_block_count(layers)
    writer.add_context_length(sizes["max_context"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(sizes["expert_size"])
    writer.add_expert_feed_forward_length(sizes["expert_size"])
    writer.add_expert_shared_feed_forward_length(sizes["shared_expert_size"])
    writer.add_expert_count(arguments.experts)
    writer.add_expert_used_count(sizes["experts_per_token"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(sizes["linear_key_dim"])
    writer.add_ssm_group_count(sizes["linear_key_heads"])
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(value)
    writer.add_uint32("qwen35moe.full_attention_interval", 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{number}>" for number in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["< >"])
    writer.add_eos_token_id(vocabulary - 1)
    generator = np.random.default_rng(0)

    tensors: list[Callable[[], Any]] = []  # made one at a time, to save memory

    def add_quantized(name: str, *shape: int) -> None:
        packed = (*shape[:-1], shape[-1] // 256 * 144)

        def make() -> Any:
            raw = generator.integers(0, 256, (math.prod(packed) // 144, 144), np.uint8)
            # These d and dmin of a block give weights a mean of 0. With a different mean, the hidden states of all
            # tokens become alike, and all tokens choose the same experts. The 6-bit scales and the codes are random.
            scales = np.array([0.001, 0.0075], np.float16)
            raw[:, :4] = scales.view(np.uint8)
            return raw.reshape(packed)

        kind = gguf.GGMLQuantizationType.Q4_K
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), raw_dtype=kind)
        tensors.append(make)

    def add_plain(name: str, *shape: int, mean: float = 0.0, scale: float = 0.02) -> None:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
        tensors.append(lambda: (mean + scale * generator.standard_normal(shape)).astype(np.float32))

    add_quantized("token_embd.weight", vocabulary, hidden)
    add_plain("output_norm.weight", hidden, mean=1.0)
    add_quantized("output.weight", vocabulary, hidden)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        add_plain(prefix + "attn_norm.weight", hidden, mean=1.0)
        add_plain(prefix + "post_attention_norm.weight", hidden, mean=1.0)
        if layer % 4 == 3:
            add_quantized(prefix + "attn_q.weight", 2 * heads * dim, hidden)
            add_quantized(prefix + "attn_k.weight", kv_heads * dim, hidden)
            add_quantized(prefix + "attn_v.weight", kv_heads * dim, hidden)
            add_quantized(prefix + "attn_output.weight", hidden, heads * dim)
            add_plain(prefix + "attn_q_norm.weight", dim, mean=1.0)
            add_plain(prefix + "attn_k_norm.weight", dim, mean=1.0)
        else:
            add_quantized(prefix + "attn_qkv.weight", 2 * key + value, hidden)
            add_quantized(prefix + "attn_gate.weight", value, hidden)
            add_quantized(prefix + "ssm_alpha.weight", value_heads, hidden)
            add_quantized(prefix + "ssm_beta.weight", value_heads, hidden)
            add_quantized(prefix + "ssm_out.weight", hidden, value)
            add_plain(prefix + "ssm_conv1d.weight", 2 * key + value, 4, scale=0.5)
            add_plain(prefix + "ssm_a", value_heads, mean=-1.0)
            add_plain(prefix + "ssm_dt.bias", value_heads)
            add_plain(prefix + "ssm_norm.weight", sizes["linear_value_dim"], mean=1.0)
        add_plain(prefix + "ffn_gate_inp.weight", arguments.experts, hidden)
        add_plain(prefix + "ffn_gate_inp_shexp.weight", hidden)
        inner = sizes["expert_size"]
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            add_quantized(f"{prefix}ffn_{part}_shexp.weight", *shape)
            add_quantized(f"{prefix}ffn_{part}_exps.weight", arguments.experts, *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in tensors:
        writer.write_tensor_data(make())
    writer.close()
    partial.rename(path)
    return {"bytes": path.stat().st_size}


if __name__ == "__main__":
    main()
