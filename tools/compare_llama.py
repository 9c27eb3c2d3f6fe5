"""Compare decode speed with llama.cpp, in turns, on one model of the 397B's geometry with random weights.

    python -m venv peer && peer/bin/pip install llama-cpp-python gguf numpy      # builds llama.cpp: minutes
    python tools/compare_llama.py --peer peer/bin/python --layers 4 --experts 64 --folder /tmp/compare

Both programs run K=4 with the same sizes and a vocabulary of about 260, on the cores of this process: ours with 4 bits
in groups of 64 (4.5 bits per weight), llama.cpp with Q4_K (4.5 bits). Each process decodes ``--tokens`` random tokens
in a round, and the processes run in the order A B B A. Fewer experts than 512 take less space; a token still reads K of
them in each layer. The weights differ, so only times are compared. Random tokens choose different experts at each step.
Without ``--cold`` 8 tokens are decoded before the first timed one. With ``--cold`` both models' files are dropped from
the page cache before each process, every token counts, the time until the model is open counts too, and the first and
the last tokens are also shown separately. ``--options`` are options of the backend, ``--prefetch`` of the engine:

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
from pathlib import Path
from statistics import median
from typing import Any

SIZES = {
    "hidden_size": 4096,
    "experts_per_token": 4,
    "expert_size": 1024,
    "shared_expert_size": 1024,
    "num_heads": 32,
    "num_kv_heads": 2,
    "head_dim": 256,
    "linear_key_heads": 16,
    "linear_value_heads": 64,
    "linear_key_dim": 128,
    "linear_value_dim": 128,
    "max_context": 4096,
    "bits": 4,
    "seed": 0,
}
_WARM_UP = 8
_FIRST, _LAST = 60, 100


def main() -> None:
    """Write both models where they are missing, run the rounds, print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--backend", default="mmap")
    parser.add_argument("--options", default="", help="of the backend: name=value,name=value")
    parser.add_argument("--prefetch", default="none")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2, help="of A B B A")
    parser.add_argument("--cold", action="store_true", help="evict the page cache before each process")
    parser.add_argument("--folder", type=Path, default=Path("compare-llama"))
    parser.add_argument("--side", choices=("ours", "peer", "write"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": _ours, "peer": _peer, "write": _write_gguf}[arguments.side](arguments)))
        return
    if not arguments.peer:
        parser.error("--peer is needed")
    from flashmoe_mlx.stores.page_cache import cached_bytes, evict

    _run(arguments, "ours", only_make=True)
    if not _gguf(arguments).exists():
        _run(arguments, "write")
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for side in ("ours", "peer", "peer", "ours") * arguments.rounds:
        if arguments.cold:
            evict(path for path in arguments.folder.rglob("*") if path.is_file())
            # The host of a virtual machine may reclaim free memory and return it slowly (2026-11-25-cold.md), so touch
            # it first, in another process that frees it again.
            touch = "from flashmoe_mlx.stores.memory import *; allocate_huge_pages(available_memory() - GIB)"
            subprocess.run([sys.executable, "-c", touch], check=True)  # noqa: S603
        found = _run(arguments, side)
        if arguments.cold and side == "peer":
            found["what"] += f", {cached_bytes(_gguf(arguments)) / 1e9:.1f} GB of its file in the page cache at the end"
        results[side].append(found)
        print(
            f"{side}: open after {found['open']:.1f} s, median {median(found['ms']):.1f} ms a token, "
            f"peak of memory {found['peak'] / 1e9:.1f} GB; {found['what']}",
            file=sys.stderr,
        )
    spans = {"all": slice(None)}
    if arguments.cold and arguments.tokens >= _FIRST + _LAST:
        spans |= {f"first {_FIRST}": slice(_FIRST), f"last {_LAST}": slice(-_LAST, None)}
    print("| | tokens | ms a token: p5 / p50 / p95 | mean | medians of the rounds |\n|---|---|---|---|---|")
    for span, part in spans.items():
        for side, title in (("ours", f"flashmoe_mlx, {arguments.backend}"), ("peer", "llama.cpp, mmap")):
            taken = [one["ms"][part] for one in results[side]]
            every = sorted(ms for one in taken for ms in one)
            low, middle, high = (every[int(share * (len(every) - 1))] for share in (0.05, 0.5, 0.95))
            rounds = ", ".join(f"{median(one):.1f}" for one in taken)
            mean = sum(every) / len(every)
            print(f"| {title} | {span} | {low:.1f} / {middle:.1f} / {high:.1f} | {mean:.1f} | {rounds} |")
    if arguments.cold:
        for side, title in (("ours", "flashmoe_mlx"), ("peer", "llama.cpp")):
            opened = ", ".join(f"{one['open']:.1f}" for one in results[side])
            ended = ", ".join(f"{one['open'] + sum(one['ms']) / 1e3:.1f}" for one in results[side])
            print(f"{title}: open after {opened} s, all {arguments.tokens} tokens after {ended} s")


def _run(arguments: argparse.Namespace, side: str, only_make: bool = False) -> Any:
    python = sys.executable if side == "ours" else arguments.peer
    own = ["--layers", arguments.layers, "--experts", arguments.experts, "--backend", arguments.backend]
    own += ["--tokens", 0 if only_make else arguments.tokens, "--folder", arguments.folder, "--side", side]
    own += ["--options", arguments.options, "--prefetch", arguments.prefetch, *["--cold"] * arguments.cold]
    done = subprocess.run([python, __file__, *map(str, own)], check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return json.loads(done.stdout.splitlines()[-1])


def _timed(arguments: argparse.Namespace, step: Callable[[int], object]) -> list[float]:
    """Return the milliseconds of each token after the warm-up."""
    times, before = [], 0 if arguments.cold else _WARM_UP
    for number in range(arguments.tokens + before):
        token = random.Random(number).randrange(256)  # noqa: S311
        start = time.perf_counter()
        step(token)
        times.append(1e3 * (time.perf_counter() - start))
    return times[before:]


def _peak() -> int:
    """Return the peak resident size of this process in bytes, mapped files included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx
    import yaml

    import flashmoe_mlx
    from flashmoe_mlx.made_models.synthetic import synthetic_pack
    from flashmoe_mlx.made_models.synthetic_sizes import SyntheticSizes

    mx.set_default_device(mx.cpu)
    sizes = SyntheticSizes(num_layers=arguments.layers, num_experts=arguments.experts, **SIZES)
    pack = synthetic_pack("compare", sizes, arguments.folder).folder
    if not arguments.tokens:
        return {}
    options = dict(option.split("=", 1) for option in filter(None, arguments.options.split(",")))
    parsed = {name: yaml.safe_load(value) for name, value in options.items()}
    start = time.perf_counter()
    with flashmoe_mlx.load(pack, arguments.backend, prefetch=arguments.prefetch, **parsed) as engine:
        opened, cache = time.perf_counter() - start, engine.new_cache()
        times = _timed(arguments, lambda token: engine.forward([token], cache))
        stats = engine.store.stats()
        experts = {
            runs for path, runs in engine.setup["kernels"].items() if path.startswith("routed_experts: one token")
        }
        what = f"{', '.join(experts)}, hits {stats.hits / max(1, stats.requests):.0%}"
        return {"ms": times, "open": opened, "peak": _peak(), "what": what}


def _gguf(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.folder
    return folder / f"compare-{arguments.layers}-{arguments.experts}.gguf"


def _peer(arguments: argparse.Namespace) -> dict[str, Any]:
    import llama_cpp

    if arguments.cold:
        # It would rearrange the weights into a copy in memory of its own, which is larger than there is.
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def without_copy() -> Any:
            parameters = defaults()
            parameters.use_extra_bufts = False
            return parameters

        llama_cpp.llama_cpp.llama_model_default_params = without_copy
    start = time.perf_counter()
    llama = llama_cpp.Llama(
        str(_gguf(arguments)), n_ctx=512, n_threads=len(os.sched_getaffinity(0)), verbose=False, logits_all=False
    )
    opened = time.perf_counter() - start
    times = _timed(arguments, lambda token: llama.eval([token]))
    what = llama_cpp.llama_print_system_info().decode().split("|")[0]
    return {"ms": times, "open": opened, "peak": _peak(), "what": what}


def _write_gguf(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write random Q4_K weights; norms and the other tensors that llama.cpp keeps in f32 are f32."""
    import gguf
    import numpy as np

    path = _gguf(arguments)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen35moe")
    layers, hidden, vocabulary = arguments.layers, SIZES["hidden_size"], 256 + 4
    heads, kv_heads, dim = SIZES["num_heads"], SIZES["num_kv_heads"], SIZES["head_dim"]
    key = SIZES["linear_key_heads"] * SIZES["linear_key_dim"]
    value_heads, value = SIZES["linear_value_heads"], SIZES["linear_value_heads"] * SIZES["linear_value_dim"]
    writer.add_block_count(layers)
    writer.add_context_length(SIZES["max_context"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(SIZES["expert_size"])
    writer.add_expert_feed_forward_length(SIZES["expert_size"])
    writer.add_expert_shared_feed_forward_length(SIZES["shared_expert_size"])
    writer.add_expert_count(arguments.experts)
    writer.add_expert_used_count(SIZES["experts_per_token"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(SIZES["linear_key_dim"])
    writer.add_ssm_group_count(SIZES["linear_key_heads"])
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

    made: list[Callable[[], Any]] = []  # one tensor at a time is in memory

    def quantised(name: str, *shape: int) -> None:
        packed = (*shape[:-1], shape[-1] // 256 * 144)

        def make() -> Any:
            raw = generator.integers(0, 256, (math.prod(packed) // 144, 144), np.uint8)
            # d and dmin of a block, so that weights are 0 in the mean: others drown the token in what all have in
            # common, and every token takes the same experts. The block's 6-bit scales and codes are random.
            scales = np.array([0.001, 0.0075], np.float16)
            raw[:, :4] = scales.view(np.uint8)
            return raw.reshape(packed)

        kind = gguf.GGMLQuantizationType.Q4_K
        writer.add_tensor_info(name, packed, np.dtype(np.uint8), math.prod(packed), raw_dtype=kind)
        made.append(make)

    def plain(name: str, *shape: int, mean: float = 0.0, scale: float = 0.02) -> None:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
        made.append(lambda: (mean + scale * generator.standard_normal(shape)).astype(np.float32))

    quantised("token_embd.weight", vocabulary, hidden)
    plain("output_norm.weight", hidden, mean=1.0)
    quantised("output.weight", vocabulary, hidden)
    for layer in range(layers):
        own = f"blk.{layer}."
        plain(own + "attn_norm.weight", hidden, mean=1.0)
        plain(own + "post_attention_norm.weight", hidden, mean=1.0)
        if layer % 4 == 3:
            quantised(own + "attn_q.weight", 2 * heads * dim, hidden)
            quantised(own + "attn_k.weight", kv_heads * dim, hidden)
            quantised(own + "attn_v.weight", kv_heads * dim, hidden)
            quantised(own + "attn_output.weight", hidden, heads * dim)
            plain(own + "attn_q_norm.weight", dim, mean=1.0)
            plain(own + "attn_k_norm.weight", dim, mean=1.0)
        else:
            quantised(own + "attn_qkv.weight", 2 * key + value, hidden)
            quantised(own + "attn_gate.weight", value, hidden)
            quantised(own + "ssm_alpha.weight", value_heads, hidden)
            quantised(own + "ssm_beta.weight", value_heads, hidden)
            quantised(own + "ssm_out.weight", hidden, value)
            plain(own + "ssm_conv1d.weight", 2 * key + value, 4, scale=0.5)
            plain(own + "ssm_a", value_heads, mean=-1.0)
            plain(own + "ssm_dt.bias", value_heads)
            plain(own + "ssm_norm.weight", SIZES["linear_value_dim"], mean=1.0)
        plain(own + "ffn_gate_inp.weight", arguments.experts, hidden)
        plain(own + "ffn_gate_inp_shexp.weight", hidden)
        inner = SIZES["expert_size"]
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            quantised(f"{own}ffn_{part}_shexp.weight", *shape)
            quantised(f"{own}ffn_{part}_exps.weight", arguments.experts, *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in made:
        writer.write_tensor_data(make())
    writer.close()
    partial.rename(path)
    return {"bytes": path.stat().st_size}


if __name__ == "__main__":
    main()
