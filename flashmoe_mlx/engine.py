"""The Python interface: load a model, run it on tokens, generate text."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex, Unpack

import mlx.core as mx
import numpy as np

from flashmoe_mlx.adapters.config import AdaptedConfig
from flashmoe_mlx.adapters.options import NO_PROMPT_CACHE, keeps_prompts, refuse_options
from flashmoe_mlx.custom_kernels import Kernels, choose, native
from flashmoe_mlx.custom_kernels.precision import activation_type
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import AFFINE
from flashmoe_mlx.generation.following import Follower
from flashmoe_mlx.generation.grammars import Grammars
from flashmoe_mlx.generation.joining import compare, join
from flashmoe_mlx.generation.logits import Logits
from flashmoe_mlx.generation.loop import Generation
from flashmoe_mlx.generation.metrics import RunMetrics
from flashmoe_mlx.generation.pass_meter import Watcher
from flashmoe_mlx.generation.prompt_cache.cache import PromptCache
from flashmoe_mlx.generation.prompt_cache.disk import Disk, open_disk
from flashmoe_mlx.generation.prompt_cache.size import prompt_cache_bytes
from flashmoe_mlx.generation.prompting import Messages, encode_prompt
from flashmoe_mlx.generation.request import (
    PrefillProgress,
    PromptOptions,
    Request,
    RequestOptions,
    checked_chunk,
    make_request,
    prompt_options,
)
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sampling import PublishedSampling
from flashmoe_mlx.generation.text_stream import Piece
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.layers.sequences import BLOCK
from flashmoe_mlx.model_files import open_model
from flashmoe_mlx.models.code_paths import check_model
from flashmoe_mlx.models.runnable import RunnableModel
from flashmoe_mlx.moe.context import RoutingObserver
from flashmoe_mlx.moe.prefetch import Guesses, Prefetcher, make_prefetcher
from flashmoe_mlx.nodes.group import Nodes
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.progress import Listener, reports_to
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.registry import open_store
from flashmoe_mlx.text.tokenizer import Tokenizer

__all__ = ["Engine", "Generation", "Piece", "Request", "RequestOptions", "load"]
_log = logging.getLogger(__name__)
_NO_TEMPLATE = (
    "this model has no chat template: prompts are sent as they are, as with raw=true, and it may continue them rather "
    "than answer"
)
_FEW_KV_BITS = (
    "kv_bits=4 can spoil the arguments of tool calls in long conversations; kv_bits=8 is nearly exact, and "
    "task=evaluate kv_bits=4 measures this model"
)
_BY_MLX = "experts in {mode} are computed by MLX's own operations, which are slower than kernels for affine formats"


def _modes_by_mlx(store: ExpertStore, kernels: Kernels) -> set[str]:
    """Return the modes of the experts of ``store`` that only MLX's operations compute with."""
    modes = {form.mode for layout in store.layout.distinct for form in layout.formats}
    return modes.difference((AFFINE,) if kernels.routed_experts_cpu is None else native.modes())


def load(
    model: str | Path,
    backend: str | Mapping[str, Any] = "pread",
    experts_k: int | None = None,
    *,
    kernels: str = "auto",
    activations: str = "auto",
    kv_bits: int | None = None,
    prefetch: str = "none",
    profile: bool = False,
    prompt_cache_gib: float | None = None,
    cache_dir: str | Path | None = None,
    cache_dir_gib: float = 16.0,
    nodes: Nodes | None = None,
    on_load: Listener = _log.info,
    **backend_options: Any,
) -> "Engine":
    """Open a pack or a published checkpoint, ready to run.

    On an NVIDIA GPU, the first load of a model compiles kernels, which stay in the user's cache (``FLASHMOE_CACHE``).

    Args:
        model: folder of the pack or checkpoint.
        backend: name of a file in ``configs/backend/``, or a mapping with ``_target_`` for a store from elsewhere.
        experts_k: routed experts per token; None for the model's own number.
        kernels: "auto", "mlx" or "reference"; see ``custom_kernels.choose``.
        activations: on a CPU, "bf16" or "int8" rounds the inputs of products of more than 8 tokens to 8 bits of
            precision, which makes prompts faster and less exact; "auto" is exact.
        kv_bits: 16, 8 or 4 stores keys and values with this width, which takes less memory and is less exact; None
            stores them as the activations are.
        prefetch: "none", "previous_token", "next_router" or "early_router": which experts are read ahead while
            decoding; see ``moe.prefetch``.
        profile: evaluate every phase separately, which is slower but makes the split of the time exact.
        prompt_cache_gib: memory for the states of earlier prompts and answers, from which later prompts continue; 0 to
            compute every prompt, None for a sixteenth of the machine's memory, at most 4 GiB.
        cache_dir: folder in which conversations outlast the process, readable by its owner only; None for none.
        cache_dir_gib: the largest size of the conversations of this model in ``cache_dir``.
        nodes: the nodes that share the experts of the model, of which this process is one; every node loads the model
            with the same arguments. Node 0 answers, and all other nodes call ``Engine.follow``. None for one machine.
        on_load: called with the current activity if loading takes longer than a second; the default writes to the log.
        **backend_options: options of the backend, as in its YAML.

    Raises:
        InputError: the model, the backend or an option is wrong.
        NodeMismatchError: a node differs from node 0.
        NodeFailedError: another node cannot load the model.
        NodeLostError: another node is gone.
    """
    with reports_to(on_load), nullcontext() if nodes is None else nodes.loading():
        chosen = choose(kernels, activations, kv_bits)
        files = open_model(expand_path(model))
        if isinstance(files.config, AdaptedConfig):
            given = {"kernels": kernels, "activations": activations, "kv_bits": kv_bits}
            refuse_options({**given, "prefetch": prefetch, "cache_dir": cache_dir})
        cache_bytes = prompt_cache_bytes(prompt_cache_gib)
        k = _checked_k(experts_k, files.config.experts_per_token, files.config.num_experts)
        tokenizer = Tokenizer.load(files.folder) if (files.folder / "tokenizer.json").exists() else None
        sampling = PublishedSampling.load(files.folder)
        dtype = activation_type()
        share = None if nodes is None else nodes.share
        mx.reset_peak_memory()
        store, settings = open_store(files, backend, backend_options, chosen.routed_experts_cpu is not None, share)
        try:
            built = files.build(store, k, chosen, dtype)
            prefetcher = make_prefetcher(prefetch, store, built.routers)
            if store.reads:
                store.prefetch(0, ())  # an empty hint, which allocates slots and threads before any clock starts
            checked = check_model(chosen, built, on_nodes=nodes is not None)
        except BaseException:
            store.close()
            raise
        no_prompts = NO_PROMPT_CACHE if cache_bytes and not keeps_prompts(built) else None
        cache_bytes = 0 if no_prompts else cache_bytes
        notes = [checked.note, no_prompts, _NO_TEMPLATE if tokenizer and tokenizer.chat_template is None else None]
        notes.append(_FEW_KV_BITS if kv_bits == 4 else None)
        notes += [_BY_MLX.format(mode=mode) for mode in sorted(_modes_by_mlx(store, chosen))]
        setup = {
            "experts_k": k,
            "experts": store.layout.to_record(),
            "activations": str(built.dtype) if activations == "auto" else activations,
            "kv_bits": kv_bits,
            "kernels": checked.names,
            "replaced_kernels": checked.replaced,
            "note": "; ".join(filter(None, notes)) or None,
            "prefetch": prefetch,
            "backend": settings,
            "prompt_cache_bytes": cache_bytes,
            "nodes": None if share is None else share.to_json(),
        }
        template = None if tokenizer is None else tokenizer.chat_template
        tool_format = (template and template.tool_format) or files.tool_format
        disk = None
        if cache_dir is not None:
            try:
                disk = open_disk(expand_path(cache_dir), cache_dir_gib, files.folder, setup, built)
            except BaseException:
                store.close()
                raise
    if nodes is not None:
        try:
            compare(files.folder, setup, store, nodes)
            built = join(built, nodes)
        except BaseException:
            store.close()
            raise
    return Engine(built, store, tokenizer, setup, profile, prefetcher, sampling, cache_bytes, disk, tool_format, nodes)


def _checked_k(experts_k: int | None, own: int, available: int) -> int:
    if experts_k is None:
        return own
    if type(experts_k) is not int or not 1 <= experts_k <= available:
        raise InputError(
            f"experts_k={experts_k!r}: must be from 1 to {available}, the experts of this model (its own is {own})"
        )
    return experts_k


class Engine:
    """A loaded model; close it, or use it as a context manager.

    Threads may use an engine in turn. A call raises ``EngineBusyError`` while another thread is inside the engine.
    """

    def __init__(
        self,
        model: RunnableModel,
        store: ExpertStore,
        tokenizer: Tokenizer | None,
        setup: Mapping[str, Any],
        profile: bool = False,
        prefetcher: Prefetcher | None = None,
        sampling: PublishedSampling | None = None,
        prompt_cache_bytes: int = 0,
        disk: Disk | None = None,
        tool_format: str | None = "qwen_xml",
        nodes: Nodes | None = None,
    ) -> None:
        self.store = store
        self._nodes = nodes
        self._tool_format = tool_format
        self.setup = setup
        """Experts per token, their format, kernels, prefetch, and the backend with its options, for JSON."""
        self.sampling: PublishedSampling = sampling or PublishedSampling({}, samples=False)
        """The sampling options that the model publishes: the defaults of ``generate``."""
        self.metrics: RunMetrics = RunMetrics()
        """Measurements of the latest generation; each ``Generation`` also has separate measurements."""
        self._tokenizer = tokenizer
        prompt_cache = None
        if prompt_cache_bytes or disk is not None:
            prompt_cache = PromptCache(prompt_cache_bytes, model.state_bytes, tokenizer, disk)
        self.runner: Runner = Runner(
            model,
            store,
            PhaseClock(profile),
            prefetcher,
            traces=not setup.get("replaced_kernels"),
            prompt_cache=prompt_cache,
            nodes=nodes,
        )
        """Runs several sequences together, for callers that schedule them."""
        self._guesses = Guesses()
        """Guesses about sequences that ``forward`` runs."""

    def __repr__(self) -> str:
        config = self.model.config
        used = self.setup["experts_k"]
        return f"<Engine: {config.num_layers} layers, {config.num_experts} experts, {used} per token>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def follow(self) -> None:
        """Run the passes that node 0 orders, until it closes its engine; for all other nodes.

        Raises:
            NodeLostError: another node is gone.
        """
        assert self._nodes is not None
        Follower(self.runner, self._nodes).run()

    def close(self) -> None:
        """Free the store; may be called again.

        Raises:
            EngineBusyError: a forward pass is running.
        """
        with self.runner.exclusive():
            self.runner.close()

    @property
    def model(self) -> RunnableModel:
        """The model itself, for inspection."""
        return self.runner.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: the model has no tokenizer.json; code "no_tokenizer".
        """
        if self._tokenizer is None:
            raise InputError(
                "this model has no tokenizer.json: only logits() and forward(), which take token ids, can run it",
                code="no_tokenizer",
            )
        return self._tokenizer

    @property
    def tool_format(self) -> str:
        """The name of the module in ``text/tool_formats`` for the model's calls of tools.

        Raises:
            InputError: the format is not known; code "unknown_tool_format".
        """
        if self._tool_format is None:
            raise InputError(
                "this model's format of tool calls is not known here: send no tools", code="unknown_tool_format"
            )
        return self._tool_format

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.model.config.vocab_size, self._tool_format)

    def observe_routing(self, observer: RoutingObserver | None) -> None:
        """Report every routing decision to ``observer`` from now on; None ends the reports.

        Raises:
            EngineBusyError: a forward pass is running.
        """
        with self.runner.exclusive():
            self.runner.meter.observer = observer

    def watch(self, watcher: Watcher | None) -> None:
        """Report every pass of sequences to ``watcher``, from the next one on; None ends the reports.

        Unlike ``observe_routing``, this changes neither results nor the way in which passes run. Any thread may call it
        at any time. ``watcher`` is called in the thread of the engine, which waits for it.
        """
        self.runner.meter.watcher = watcher

    def stats(self) -> dict[str, Any]:
        """Return the measurements of the latest generation and the store's counters since opening, for JSON."""
        store = self.store.stats()
        return {
            **self.metrics.to_json(self.model.touched_bytes, self.store.layout.mean_record_bytes),
            "store_total": {name: getattr(store, name) for name in store.__dataclass_fields__},
        }

    def new_cache(self) -> SequenceCache:
        """Return the state of a sequence that has not begun."""
        return self.model.new_cache()

    def forward(self, token_ids: Sequence[SupportsIndex], cache: SequenceCache) -> Logits:
        """Compute the logits f32 [T, vocabulary] of ``token_ids`` after the tokens in ``cache``, which they join.

        A single token that continues a sequence counts as a decode step.

        Raises:
            InputError: ``token_ids`` is empty, holds a token outside the vocabulary, or exceeds the context.
            FlashMoeError: a logit is NaN or +inf; code "bad_logits".
            EngineBusyError: another forward pass is running.
        """
        return self._forward(self.runner.checked_tokens(token_ids, cache.length), cache, len(token_ids) == 1)

    def logits(self, token_ids: Sequence[SupportsIndex], prefill_chunk: int | None = None) -> Logits:
        """Compute the logits f32 [T, vocabulary] after each of ``token_ids``, ``prefill_chunk`` or 1,024 at a time.

        The result takes 4 bytes for each token and vocabulary entry. Raises the errors of ``forward``.
        """
        tokens = self.runner.checked_tokens(token_ids)
        size = checked_chunk(prefill_chunk) or BLOCK
        cache = self.new_cache()
        chunks = (tokens[start : start + size] for start in range(0, len(tokens), size))
        return np.concatenate([self._forward(chunk, cache, decoding=False) for chunk in chunks])

    def generate(
        self, prompt: str | Messages, *, on_prefill: PrefillProgress | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """Begin an answer to ``prompt``; return an iterator that computes its pieces on demand.

        All arguments are checked before this method returns.

        Args:
            prompt: a user's message, or messages with "role" and "content".
            on_prefill: called with the progress through the prompt, at least once per layer.
            **options: the options of the answer, such as ``max_tokens=100``; see ``RequestOptions``.

        Raises:
            InputError: an option is out of range, or the prompt does not fit.
            TypeError: an option does not exist.
        """
        start = time.perf_counter()
        request = self.request(prompt, **options)
        generation = Generation(self.runner, self.runner.begin(request, on_prefill, start), self.tokenizer)
        self.metrics = generation.metrics
        return generation

    def request(self, prompt: str | Messages, **options: Unpack[RequestOptions]) -> Request:
        """Return the request that ``generate`` answers; arguments and errors are those of ``generate``."""
        token_ids = self.runner.checked_tokens(self.encode(prompt, **prompt_options(options)))
        tools, thinking = options.get("tools"), options.get("enable_thinking")
        if tools:
            _ = self.tool_format
        constraint = self._grammars.constraint(options, tools, options.get("raw", False), thinking)
        return make_request(token_ids, options, self.sampling, self.tokenizer, constraint)

    def encode(self, prompt: str | Messages, **options: Unpack[PromptOptions]) -> list[int]:
        """Return the tokens that ``generate`` sends for a prompt; errors are those of ``generate``."""
        return encode_prompt(prompt, self.tokenizer, **options)

    def _forward(self, tokens: list[int], cache: SequenceCache, decoding: bool) -> Logits:
        with self.runner.exclusive():
            if not cache.length:
                self._guesses = Guesses()
            return self.runner.logits(tokens, cache, self._guesses, decoding=decoding and cache.length > 0)
