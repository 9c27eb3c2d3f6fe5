"""The choice between implementations in the extension by measurement."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.custom_kernels.native import fastest
from flashmoe_mlx.custom_kernels.native.fastest import Contest, Memory, Trial, settle
from flashmoe_mlx.custom_kernels.quantized_matvec.instructions import Form, contests

EXTENSION = native.extension()
pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the extension for CPUs was not built")
SMALL = Form(96, 128, 4, 32, mx.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Begin without choices, in an empty cache folder and with little memory; restore the choice by flags."""
    monkeypatch.delenv("FLASHMOE_INSTRUCTIONS", raising=False)
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "_settled", {})
    monkeypatch.setattr(fastest, "_memory_bytes", lambda: 2**20)
    yield tmp_path
    if EXTENSION is not None:
        EXTENSION.use_instruction_set("auto")


class Clock:
    """A contest whose candidates take given microseconds, on a clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **microseconds: float) -> None:
        self.now, self.calls, self.used = 0.0, 0, ""
        self.wrong: set[str] = set()
        self.contest = Contest(
            "a contest", list(microseconds), self.use, lambda _: Trial([self.call] * 3, mx.ones((1, 1)))
        )
        self._microseconds = microseconds
        monkeypatch.setattr(fastest.time, "perf_counter", lambda: self.now)

    def use(self, name: str) -> None:
        self.used = name

    def call(self) -> mx.array:
        self.calls += 1
        self.now += self._microseconds[self.used] * 1e-6
        return mx.full((1, 1), 2.0 if self.used in self.wrong else 1.0)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"a": 10.0, "b": 20.0}, "a"),
        ({"a": 20.0, "b": 10.0, "c": 15.0}, "b"),
        ({"a": 10.3, "b": 10.0}, "a"),  # within the margin, the first stays
    ],
)
def test_the_fastest_is_used(times: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, **times)
    (choice,) = settle([clock.contest])
    assert choice.chosen == clock.used == chosen
    assert choice.microseconds == pytest.approx(times, abs=0.2)


def test_a_wrong_candidate_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch, a=10.0, b=1.0)
    clock.wrong = {"b"}
    (choice,) = settle([clock.contest])
    assert (choice.chosen, str(choice)) == ("a", "a")
    assert "a contest: b computes a wrong result" in caplog.text


def test_a_choice_says_how_much_faster_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (choice,) = settle([Clock(monkeypatch, a=20.0, b=10.0, c=15.0).contest])
    assert str(choice) == "b: 1.50 times as fast as c, 2.00 times a"


def test_a_choice_is_kept_for_later_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = settle([Clock(monkeypatch, a=20.0, b=10.0).contest])
    clock = Clock(monkeypatch, a=10.0, b=20.0)  # would now choose otherwise
    monkeypatch.setattr(fastest, "_settled", {})
    (second,) = settle([clock.contest])
    assert (second, clock.used, clock.calls) == (first, "b", 0)


@pytest.mark.parametrize("damage", [b"", b"{}", b"x" * 100])
def test_a_damaged_file_is_measured_again(damage: bytes, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle([Clock(monkeypatch, a=20.0, b=10.0).contest])
    files = [file for file in own_cache.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(damage)
    monkeypatch.setattr(fastest, "_settled", {})
    (choice,) = settle([Clock(monkeypatch, a=10.0, b=20.0).contest])
    assert choice.chosen == "a"


def test_another_number_of_threads_is_another_choice(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    assert EXTENSION is not None
    before = EXTENSION.threads()
    settle([Clock(monkeypatch, a=20.0, b=10.0).contest])
    monkeypatch.setattr(fastest, "_settled", {})
    EXTENSION.use_threads(before + 1)
    try:
        (choice,) = settle([Clock(monkeypatch, a=10.0, b=20.0).contest])
    finally:
        EXTENSION.use_threads(before)
    assert choice.chosen == "a"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "file"))
    (choice,) = settle([Clock(monkeypatch, a=20.0, b=10.0).contest])
    assert choice.chosen == "b"


def test_the_environment_forces_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_INSTRUCTIONS", "portable")
    clock = Clock(monkeypatch, a=20.0, b=10.0)
    assert settle([clock.contest]) == []
    assert (clock.used, clock.calls) == ("", 0)


MANY = {
    "f32": ["more than 8 tokens"],
    "bf16": ["more than 8 tokens, vectors in bf16"],
    "int8": ["more than 8 tokens, vectors in int8"],
}


@pytest.mark.parametrize("activations", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", native.BITS)
def test_products_of_every_format_have_a_choice(bits: int, dtype: mx.Dtype, activations: str) -> None:
    if not native.has_activations(activations):
        pytest.skip("this machine has no such products")
    made = list(contests([Form(96, 160, bits, 32, dtype), Form(8, 96, bits, 32, dtype)], activations))
    choices = settle(made)
    assert [choice.contest for choice in choices] == [
        f"instructions for {tokens}, {bits} bits in groups of 32"
        for tokens in ("one token", "2 to 8 tokens", *MANY[activations])
    ]
    for contest, choice in zip(made, choices, strict=True):
        assert set(choice.microseconds) == set(contest.candidates)  # every one is correct


@pytest.mark.parametrize(("activations", "tolerance"), [("f32", 1e-4), ("bf16", 1e-4), ("int8", 1e-3)])
def test_every_choice_runs_and_is_named(activations: str, tolerance: float, extension: ModuleType) -> None:
    if not native.has_activations(activations):
        pytest.skip("this machine has no such products")
    for contest in contests([SMALL], activations):
        memory = Memory(2**20)
        results = []
        for name in contest.candidates:
            contest.use(name)
            results.append(np.array(contest.trial(memory).calls[0]()))
            assert name in (*extension.instruction_sets_in_use(), "avx512_bf16")
        for result in results:
            np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=tolerance)


def test_each_type_of_many_vectors_has_a_choice(extension: ModuleType) -> None:
    """A choice for vectors in int8 leaves exact products as they are."""
    candidates = extension.instruction_sets()
    types = [number for number, name in enumerate(native.ACTIVATIONS) if native.has_activations(name)]
    for number in types:
        extension.use_for_products(100, number, 4, 32, candidates[number % len(candidates)])
    assert set(extension.instruction_sets_in_use()) == {candidates[number % len(candidates)] for number in types}
    with pytest.raises(ValueError, match="no such instruction set"):
        extension.use_for_products(9, 0, 4, 32, "avx512_bf16")
    with pytest.raises(ValueError, match="out of range"):
        extension.use_for_products(0, 0, 4, 32, candidates[0])


@pytest.fixture
def extension() -> ModuleType:
    """Return the compiled part."""
    return native.loaded()


@pytest.mark.parametrize(("activations", "type_of_many"), [("auto", "f32"), ("bf16", "bf16"), ("int8", "int8")])
def test_records_name_the_choices(
    activations: str, type_of_many: str, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.has_activations(type_of_many):
        pytest.skip("this machine has no such products")
    tokens = list(range(20))
    with flashmoe_mlx.load(tiny_pack, activations=activations) as engine:
        logits, names = engine.logits(tokens), engine.setup["kernels"]
    chosen = {name: runs for name, runs in names.items() if name.startswith("instructions for ")}
    assert set(chosen) >= {
        f"instructions for {tokens}, 4 bits in groups of 64"
        for tokens in ("one token", "2 to 8 tokens", *MANY[type_of_many])
    }
    if type_of_many != "f32":
        assert any(f"more than 8 tokens, vectors in {type_of_many}" in name for name in names if name not in chosen)
    known = {*native.loaded().instruction_sets(), "avx512_bf16"}
    assert {runs.partition(":")[0] for runs in chosen.values()} <= known
    assert os.environ.get("FLASHMOE_INSTRUCTIONS") is None
    monkeypatch.setattr(fastest, "_settled", {})
    with flashmoe_mlx.load(tiny_pack, activations=activations) as engine:
        # from the cache: the same choice, and the same bits
        assert {name: engine.setup["kernels"][name] for name in chosen} == chosen
        np.testing.assert_array_equal(engine.logits(tokens), logits)


def test_memory_is_valid_in_every_type() -> None:
    memory = Memory(2**20)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        array, after = memory.place(0, (3, 1000), dtype)
        assert after % 64 == 0
        values = np.abs(np.array(array.astype(mx.float32)))
        assert 1e-3 < values.min() < values.max() < 3
        assert np.frombuffer(array, np.uint8).ctypes.data % 64 == 0  # type: ignore[call-overload]
