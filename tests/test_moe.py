"""The MoE block: the router, the strategies of routed experts, and tokens of several sequences in one pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_on_cpu
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from systems import needs_linux

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import ExpertWeights, QuantizedWeight, choose, native
from flashmoe_mlx.custom_kernels.routed_experts import gpu as routed_experts
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.formats.record import RecordLayout
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.layers.phases import PhaseClock
from flashmoe_mlx.moe.by_expert import ExpertsOneByOne, expert_weights
from flashmoe_mlx.moe.context import ForwardContext
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.grouped import ExpertsGrouped
from flashmoe_mlx.moe.groups import ExpertGroups
from flashmoe_mlx.moe.in_place import ExpertsInPlace
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.strategies import ByTokenCount, choose_strategy

needs_extension = pytest.mark.skipif(native.extension() is None, reason="kernels of the extension")
Floats = npt.NDArray[np.float64]

EXACT = 1e-4
"""Largest difference in f32, relative to the largest value; correct code gives about 1e-6."""
ROUNDED = 0.05
"""Largest difference in bf16, relative to the largest value."""
FEW_ON_CUDA = 4
"""Tokens up to which the tests have CUDA read experts in place."""


# The router


def router_of_scores(experts: int, k: int) -> Router:
    """Return a router whose scores are its input; the last input is the logit of the shared expert's weight."""
    both = mx.eye(experts + 1)
    return Router(Linear(both[:-1]), mx.ones(experts + 1), 1e-6, k, Linear(both[-1:]))


def plain_routing(scores: Floats, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the K best experts of each token, ascending, and their softmax weights, which sum to 1."""
    experts = np.sort(np.argsort(-scores, axis=-1)[:, :k], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = np.take_along_axis(weights, experts, -1)
    return experts, weights / weights.sum(-1, keepdims=True)


@st.composite
def distinct_scores(draw: st.DrawFn) -> tuple[Floats, int]:
    """Draw scores [T, experts] without ties, and K; no softmax underflows, which would make ties."""
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    step = draw(st.sampled_from([0.01, 0.5, 2.0]))
    scores = step * np.stack([random.permutation(experts) for _ in range(tokens)]).astype(np.float64)
    return scores - draw(st.sampled_from([0.0, 300.0])), draw(st.integers(1, experts))


@given(distinct_scores())
def test_the_router_chooses_the_best_experts_by_mlx_and_by_numpy(drawn: tuple[Floats, int]) -> None:
    scores, k = drawn
    router = router_of_scores(scores.shape[1], k)
    x = mx.array(np.concatenate([scores, np.zeros((len(scores), 1))], axis=-1).astype(np.float32))
    experts, weights = plain_routing(scores, k)
    by_mlx, weights_by_mlx = router.choose(x)
    by_numpy, all_weights = router.choose_on_host(x)
    np.testing.assert_array_equal(np.array(by_mlx), experts)
    np.testing.assert_array_equal(by_numpy, experts)
    np.testing.assert_allclose(np.array(weights_by_mlx), weights, atol=2e-5)
    np.testing.assert_allclose(all_weights[:, :-1], weights, atol=2e-5)
    np.testing.assert_allclose(all_weights[:, -1], 0.5)


@pytest.mark.parametrize("by_numpy", [False, True])
@pytest.mark.parametrize("logit", [-200.0, -3.0, 0.0, 3.0, 200.0])
def test_the_shared_expert_is_weighted_by_a_sigmoid(by_numpy: bool, logit: float) -> None:
    x = mx.array([[2.0, 1.0, 0.0, logit]])
    made = router_of_scores(3, 2)
    router = Router(made.gate, made.norm, made.eps, made.experts_k, made.shared_gate, by_numpy=by_numpy)
    routing = router.route(x, None, PhaseClock())
    expected = 1 / (1 + np.exp(-logit))
    assert routing.experts.tolist() == [[0, 1]]
    assert routing.experts.dtype == np.uint32
    np.testing.assert_allclose(np.array(routing.shared_weight), [[expected]], rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(np.array(routing.all_weights)[:, :-1], np.array(routing.weights))
    np.testing.assert_array_equal(np.array(routing.all_weights)[:, -1:], np.array(routing.shared_weight))


def test_the_router_waits_once_for_its_choice() -> None:
    for by_numpy in (False, True):
        made = router_of_scores(3, 2)
        router = Router(made.gate, made.norm, made.eps, made.experts_k, made.shared_gate, by_numpy=by_numpy)
        clock = PhaseClock()
        router.route(mx.array([[2.0, 1.0, 0.0, 0.0]]), None, clock, mx.arange(3) + 1)
        assert clock.waits == 1


def test_the_router_evaluates_further_arrays_in_the_same_phase() -> None:
    for by_numpy in (False, True):
        made = router_of_scores(3, 2)
        router = Router(made.gate, made.norm, made.eps, made.experts_k, made.shared_gate, by_numpy=by_numpy)
        clock = PhaseClock(split=True)
        router.route(mx.array([[2.0, 1.0, 0.0, 0.0]]), None, clock, mx.arange(3) + 1)
        assert list(clock.seconds) == ["router_wait"]


# Strategies


def test_a_strategy_is_chosen_for_kernels_and_records() -> None:
    layout = RecordLayout.uniform(128, 128, 4, 64, "F32")
    weight = QuantizedWeight(mx.zeros((128, 16), mx.uint32), mx.zeros((128, 2)), mx.zeros((128, 2)), 4, 64)
    shared = ExpertWeights(weight, weight, weight)
    dense = RecordLayout.uniform(128, 128, None, None, "F32")
    for preference in ("auto", "mlx", "reference"):
        assert isinstance(choose_strategy(choose(preference), dense, mx.float32, shared), ExpertsOneByOne)
    for preference in ("mlx", "reference"):
        assert isinstance(choose_strategy(choose(preference), layout, mx.float32, shared), ExpertsOneByOne)


@needs_extension
@pytest.mark.parametrize(("bits", "fused"), [(4, True), (None, False)])
def test_kernels_for_cpus_read_where_the_cpu_reads(bits: int | None, fused: bool) -> None:
    weight = QuantizedWeight(mx.zeros((128, 16), mx.uint32), mx.zeros((128, 2)), mx.zeros((128, 2)), bits, 64)
    layout = RecordLayout.uniform(128, 128, 4, 64, "BF16")
    strategy = choose_strategy(choose("auto"), layout, mx.float32, ExpertWeights(weight, weight, weight))
    assert isinstance(strategy, ExpertsOnHost)
    assert strategy.fuse_shared == fused


@needs_linux
@pytest.mark.parametrize(
    ("device", "many"), [(gpu_on_cpu.metal, ExpertsOneByOne), (gpu_on_cpu.cuda, ExpertsGrouped)], ids=["metal", "cuda"]
)
def test_kernels_for_gpus_read_few_tokens_in_place(device: Callable[..., Any], many: type) -> None:
    weight = QuantizedWeight(mx.zeros((128, 16), mx.uint32), mx.zeros((128, 2)), mx.zeros((128, 2)), 4, 64)
    shared = ExpertWeights(weight, weight, weight)
    with device(mx.float32):
        kernels = choose("auto")
        for dtype, fused in (("F32", True), ("BF16", False)):
            strategy = choose_strategy(kernels, RecordLayout.uniform(128, 128, 4, 64, dtype), mx.float32, shared)
            assert isinstance(strategy, ByTokenCount)
            assert isinstance(strategy.few, ExpertsInPlace)
            assert strategy.few.fuse_shared == fused
            assert isinstance(strategy.many, many)
            assert strategy.most == kernels.most_gpu_tokens > 0
        unsupported = RecordLayout.uniform(128, 128, 6, 64, "F32")
        assert isinstance(choose_strategy(kernels, unsupported, mx.float32, shared), many)


# Tokens of several sequences


def cpu(kernels: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a device on which ``load`` chooses ``kernels``."""

    @contextmanager
    def device() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flashmoe_mlx.engine.choose", lambda *_: choose(kernels))
            yield

    return device if kernels != "auto" else nullcontext


@contextmanager
def cuda(dtype: mx.Dtype) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(routed_experts.MOST_TOKENS, "cuda", FEW_ON_CUDA)
        with gpu_on_cpu.cuda(dtype):
            yield


DEVICES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], float]] = {
    "auto": (cpu("auto"), EXACT),
    "mlx": (cpu("mlx"), EXACT),
    "reference": (cpu("reference"), EXACT),
}
GPUS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], float]] = {
    "metal": (lambda: gpu_on_cpu.metal(mx.float32), EXACT),
    "cuda": (lambda: cuda(mx.float32), EXACT),
    "cuda in bf16": (lambda: cuda(mx.bfloat16), ROUNDED),
}
on_every_device = pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        *(pytest.param(*parts, id=name) for name, parts in DEVICES.items()),
        *(pytest.param(*parts, id=name, marks=needs_linux) for name, parts in GPUS.items()),
    ],
)


def block_of(engine: Engine, layer: int = 1) -> MixtureOfExperts:
    return engine.model.layers[layer].feed_forward


def residuals(engine: Engine, tokens: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).normal(size=(tokens, engine.model.norm.size)).astype(np.float32)
    return mx.array(values).astype(engine.model.norm.dtype)


def applied(block: MixtureOfExperts, residual: mx.array) -> npt.NDArray[np.float32]:
    y = block(residual, ForwardContext(PhaseClock()))
    assert y.dtype == residual.dtype
    return np.array(y.astype(mx.float32))


def plain_block(block: MixtureOfExperts, residual: mx.array) -> Floats:
    """Compute the block in f64 by its definition, one token and one expert after the other."""
    router, before = block.router, exact(residual)
    x = before / np.sqrt((before**2).mean(-1, keepdims=True) + router.eps) * exact(router.norm)
    experts, weights = plain_routing(x @ dense(router.gate).T, router.experts_k)
    shared_weights = 1 / (1 + np.exp(-x @ dense(router.shared_gate).T))
    y = before.copy()
    for token, vector in enumerate(x):
        for expert, weight in zip(experts[token].tolist(), weights[token], strict=True):
            record = block.store.fetch(block.layer, [expert]).records[0]
            y[token] += weight * plain_mlp(vector, expert_weights(record, block.store.layout[block.layer]))
        y[token] += shared_weights[token] * plain_mlp(vector, block.shared.weights)
    return y


def plain_mlp(x: Floats, expert: ExpertWeights) -> Floats:
    gate, up = dense(expert.gate) @ x, dense(expert.up) @ x
    product: Floats = dense(expert.down) @ (gate / (1 + np.exp(-gate)) * up)
    return product


def dense(weight: QuantizedWeight) -> Floats:
    if weight.bits is None:
        return exact(weight.weight)
    scales, biases = weight.scales, weight.biases
    assert scales is not None
    assert biases is not None
    parts = (scales.astype(mx.float32), biases.astype(mx.float32))
    return exact(mx.dequantize(weight.weight, *parts, group_size=weight.group_size, bits=weight.bits))


def exact(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def difference(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@on_every_device
@pytest.mark.sampled(3)
def test_several_rows_equal_single_rows(
    device: Callable[[], AbstractContextManager[Any]], tolerance: float, tiny_pack: Path
) -> None:
    """Few and many tokens, in several groups of slots. Every token uses all experts: rounding could change a choice."""
    with device(), flashmoe_mlx.load(tiny_pack, slots=5, experts_k=TINY.num_experts) as engine:
        block = block_of(engine)
        for tokens in (2, FEW_ON_CUDA + 2):
            residual = residuals(engine, tokens)
            alone = np.concatenate([applied(block, residual[row : row + 1]) for row in range(tokens)])
            assert difference(applied(block, residual), alone) < tolerance


@on_every_device
@pytest.mark.sampled(3)
def test_every_strategy_computes_the_block_by_its_definition(
    device: Callable[[], AbstractContextManager[Any]], tolerance: float, tiny_pack: Path
) -> None:
    k = TINY.num_experts if tolerance == ROUNDED else None  # rounded scores could change a choice
    with device(), flashmoe_mlx.load(tiny_pack, slots=13 if k is None else 16, experts_k=k) as engine:
        block = block_of(engine, 2)
        for tokens in (1, FEW_ON_CUDA, FEW_ON_CUDA + 5):
            residual = residuals(engine, tokens, seed=tokens)
            assert difference(applied(block, residual), plain_block(block, residual)) < tolerance


@needs_extension
@pytest.mark.parametrize("slots", [4, 9, 16])
def test_kernels_for_cpus_give_a_row_the_same_bits_beside_other_rows(slots: int, tiny_pack: Path) -> None:
    """Above some number of tokens, the kernels multiply in a different way; all smaller numbers are tested."""
    with flashmoe_mlx.load(tiny_pack, slots=slots) as engine:
        for block in (layer.feed_forward for layer in engine.model.layers):
            for tokens in range(2, native.few_tokens() + 1):
                residual = residuals(engine, tokens, seed=tokens)
                alone = np.concatenate([applied(block, residual[row : row + 1]) for row in range(tokens)])
                np.testing.assert_array_equal(applied(block, residual), alone)


# Fetches


def test_sequences_share_one_fetch(tiny_pack: Path) -> None:
    seen: list[tuple[int, npt.NDArray[np.uint32]]] = []
    with flashmoe_mlx.load(tiny_pack, slots=16) as engine:
        block, residual = block_of(engine), residuals(engine, 3)
        block(residual, ForwardContext(PhaseClock(), observer=lambda *choice: seen.append(choice)))
        stats = engine.store.stats()
    ((layer, chosen),) = seen
    assert layer == 1
    assert chosen.shape == (3, TINY.experts_per_token)
    assert stats.fetches == 1
    assert stats.requests == len(set(chosen.ravel().tolist()))


@given(
    chosen=st.lists(st.lists(st.integers(0, 11), min_size=3, max_size=3, unique=True), min_size=1, max_size=6),
    slots=st.integers(3, 12),
)
def test_groups_cover_every_choice_once(chosen: list[list[int]], slots: int) -> None:
    calls: list[Any] = []
    store = FakeStore(slots, calls)
    experts = np.sort(np.array(chosen, np.uint32), axis=-1)
    groups = ExpertGroups(store, 5, experts, PhaseClock(), lambda: calls.append("all are there"))  # type: ignore[arg-type]
    served = np.full(experts.shape, -1)
    for group in groups:
        calls.append("computed")
        assert len(group.experts) <= slots
        rows = group.rows([100 + expert for expert in group.experts])
        here = rows >= 0
        assert (served[here] == -1).all()
        served[here] = rows[here] - 100
        assert group.is_last == ("all are there" in calls)
    np.testing.assert_array_equal(served, experts)
    fetches = [call for call in calls if isinstance(call, tuple)]
    assert [expert for _, fetched in fetches for expert in fetched] == sorted(set(experts.ravel().tolist()))
    assert {layer for layer, _ in fetches} == {5}
    assert calls[-3:] == [fetches[-1], "all are there", "computed"]
    assert store.hints == fetches[1:], "every group but the first is read during the computation of the group before it"


class FakeStore:
    """A store that keeps lists of the requests and of the hints."""

    reads = True
    share = None

    def __init__(self, slots: int, calls: list[Any]) -> None:
        self.slots = slots
        self.source = SimpleNamespace(num_experts=12)
        self.hints: list[tuple[int, list[int]]] = []
        self._calls = calls

    def fetch(self, layer: int, experts: Sequence[int]) -> None:
        self._calls.append((layer, list(experts)))

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        self.hints.append((layer, list(experts)))


def test_a_sum_is_evaluated_before_its_slots_are_refilled(tiny_pack: Path) -> None:
    clock = PhaseClock(split=True)
    with flashmoe_mlx.load(tiny_pack, slots=4, kernels="mlx") as engine:
        chosen = np.arange(8, dtype=np.uint32)[None]
        for group in ExpertGroups(engine.store, 0, chosen, clock, lambda: None):
            clock.seconds.clear()
            group.finish(mx.zeros(3) + 1)
            assert ("experts" in clock.seconds) == (not group.is_last)
