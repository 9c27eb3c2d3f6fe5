"""The prompt cache: answers that continue from kept states equal answers computed from nothing."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from test_sequences import begin

import flashmoe_mlx
from flashmoe_mlx.engine import Engine
from flashmoe_mlx.generation.logits import Logits, TokenHistory
from flashmoe_mlx.generation.prompt_cache import files
from flashmoe_mlx.generation.prompt_cache.cache import PromptCache
from flashmoe_mlx.generation.prompt_cache.disk import open_disk
from flashmoe_mlx.generation.sequence import Sequence, Status
from flashmoe_mlx.made_models.synthetic import synthetic_pack


@pytest.fixture
def engine(tiny_pack: Path) -> Iterator[Engine]:
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0.05) as opened:
        yield opened


def run(engine: Engine, sequence: Sequence) -> Sequence:
    with engine.runner.exclusive():
        engine.runner.prefill(sequence)
        while sequence.status is not Status.FINISHED:
            engine.runner.decode([sequence])
    return sequence


def test_states_kept_in_a_pass_change_nothing_and_continue_it(engine: Engine) -> None:
    prompt = [int(token) for token in np.random.default_rng(0).integers(1, 200, 40)]
    whole, kept = engine.new_cache(), engine.new_cache()
    expected = engine.forward(prompt, whole)
    kept.keep_states([3, 17, 40])
    assert np.array_equal(engine.forward(prompt, kept), expected)
    states = kept.take_states(3)
    for position, state in zip((3, 17, 40), states, strict=True):
        resumed, fresh = engine.new_cache(), engine.new_cache()
        resumed.assemble([kept.part(0, 2), kept.part(2, 40)], state, position)
        engine.forward(prompt[:position], fresh)
        rest = [9, *prompt[position:]]
        logits = engine.forward(rest, resumed)
        # A pass of other tokens sums its products in another order.
        np.testing.assert_allclose(logits, engine.forward(rest, fresh), atol=2e-4)
        if position == 40:
            assert np.array_equal(logits, engine.forward(rest, whole))


def test_prompt_continues(engine: Engine) -> None:
    first = run(engine, begin(engine, list(range(1, 60)), max_tokens=8))
    assert first.metrics.reused_tokens == 0
    prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
    second = run(engine, begin(engine, prompt, max_tokens=8))
    assert second.metrics.reused_tokens == len(prompt) - 4
    assert second.metrics.reused_from == "live"
    assert second.metrics.computed_tokens == 4
    run(engine, begin(engine, [5, 6, 7, 8], max_tokens=1))
    third = run(engine, begin(engine, prompt, max_tokens=8))
    assert (third.token_ids, third.metrics.reused_from) == (second.token_ids, "ram")
    assert engine.runner.prompt_cache is not None
    engine.runner.prompt_cache.clear()
    assert run(engine, begin(engine, prompt, max_tokens=8)).token_ids == second.token_ids


class Capture:
    """A logits processor that keeps the logits of the first token."""

    def __init__(self) -> None:
        self.first: Logits | None = None

    def __call__(self, logits: Logits, _: TokenHistory) -> Logits:
        if self.first is None:
            self.first = logits.copy()
        return logits


class Conversations(RuleBasedStateMachine):
    """Requests that continue, edit and branch conversations, some of them cancelled or broken.

    Conversations are evicted, go to a disk and come back after a restart; files on it are damaged.
    """

    engine: Engine
    pack: Path
    accepted: float

    def __init__(self) -> None:
        super().__init__()
        self.known: list[list[int]] = [[3, 1, 4]]
        self.budget = 2**21
        self.appended = 0
        self.folder = tempfile.TemporaryDirectory()
        self.cache = PromptCache(self.budget, self.engine.model.state_bytes)
        self.replace_cache(on_disk=False, kib=0)

    def teardown(self) -> None:
        if self.cache.disk is not None:
            self.cache.disk.close()
        self.folder.cleanup()

    def replace_cache(self, on_disk: bool, kib: int) -> None:
        if self.cache.disk is not None:
            self.cache.disk.close()
        model = self.engine.model
        disk = None
        if on_disk:
            disk = open_disk(Path(self.folder.name), kib / 2**20, self.pack, self.engine.setup, model)
        self.cache = self.engine.runner.prompt_cache = PromptCache(self.budget, model.state_bytes, None, disk)

    @rule(
        which=st.integers(0, 50),
        cut=st.integers(0, 40),
        new=st.lists(st.integers(1, 200), min_size=1, max_size=30),
        length=st.integers(1, 4),
        chunk=st.sampled_from([5, 64]),
        cancelled_after=st.sampled_from([None, None, 0, 1, 2, 3]),
    )
    def ask(self, which: int, cut: int, new: list[int], length: int, chunk: int, cancelled_after: int | None) -> None:
        base = self.known[which % len(self.known)]
        prompt = [*base[: max(1, len(base) - cut)], *new][:180]
        capture = Capture()
        sequence = begin(self.engine, prompt, max_tokens=length, prefill_chunk=chunk, processors=(capture,))
        runner, passes = self.engine.runner, 0
        with runner.exclusive():
            while sequence.status is not Status.FINISHED:
                if passes == cancelled_after:
                    sequence.cancel()
                passes += 1
                if sequence.status is Status.WAITING:
                    runner.prefill_part([sequence])
                else:
                    runner.decode([sequence])
        assert sum(segment.loaded_bytes for segment in self.cache._tree.segments()) <= self.budget
        if self.cache.disk is None:
            assert self.cache.nbytes <= self.budget
        else:
            used = sum(file.stat().st_size for file in self.cache.disk.folder.glob("*/*"))
            assert used <= self.cache.disk._limit + self.appended
        if capture.first is not None:
            metrics = sequence.metrics
            assert metrics.computed_tokens + metrics.reused_tokens == len(prompt)
            expected = self.engine.logits(prompt)[-1]
            np.testing.assert_allclose(capture.first, expected, atol=self.accepted)
        self.known.append([*prompt, *sequence.token_ids])

    @rule(which=st.integers(0, 50))
    def break_one(self, which: int) -> None:
        def fail(logits: Logits, _: TokenHistory) -> Logits:
            raise ZeroDivisionError

        sequence = begin(self.engine, [*self.known[which % len(self.known)], 8][:180], processors=(fail,))
        before = self.cache.nbytes
        with self.engine.runner.exclusive(), pytest.raises(ZeroDivisionError):
            self.engine.runner.prefill(sequence)
        if self.cache.disk is None:
            assert self.cache.nbytes == before
        else:
            assert sum(segment.loaded_bytes for segment in self.cache._tree.segments()) <= self.budget

    @rule(
        kib=st.sampled_from([0, 100, 400, 2000]), on_disk=st.booleans(), disk_kib=st.sampled_from([50, 300, 3000, 3000])
    )
    def restart(self, kib: int, on_disk: bool, disk_kib: int) -> None:
        self.budget = 1024 * kib
        self.replace_cache(on_disk, disk_kib)

    @rule(
        which=st.integers(0, 50),
        where=st.floats(0, 1, exclude_max=True),
        how=st.sampled_from(["flip", "cut", "append", "delete", "empty"]),
    )
    def damage(self, which: int, where: float, how: str) -> None:
        files = sorted(Path(self.folder.name).glob("*/*/*"))
        if not files:
            return
        file = files[which % len(files)]
        data = bytearray(file.read_bytes())
        if how == "delete":
            file.unlink()
            return
        if how == "flip" and data:
            data[int(where * len(data))] ^= 16
        self.appended += 4 * (how == "append")
        changed = {"cut": data[: int(where * len(data))], "append": data + b"0123", "empty": b""}
        file.write_bytes(changed.get(how, data))


def test_any_order_of_requests(engine: Engine, tiny_pack: Path) -> None:
    machine = type("Bound", (Conversations,), {"engine": engine, "pack": tiny_pack, "accepted": 1e-3})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


def test_parts_before_a_damaged_one_stay_within_the_budget(tmp_path: Path) -> None:
    """Wherever a file is damaged, a request that fails leaves nothing in a memory of 0 bytes."""
    pack = synthetic_pack("tiny", replace(TINY, num_layers=2), tmp_path, family="qwen3_moe").folder
    with flashmoe_mlx.load(pack, prompt_cache_gib=0.05) as engine:
        for which, where in product(range(4), (0.3, 0.6, 0.9)):
            state = type("Bound", (Conversations,), {"engine": engine, "pack": pack, "accepted": 1e-3})()
            state.restart(kib=0, on_disk=True, disk_kib=3000)
            for turn in range(3):
                state.ask(which=turn, cut=0, new=list(range(20, 40)), length=3, chunk=64, cancelled_after=None)
            state.restart(kib=0, on_disk=True, disk_kib=3000)
            state.damage(which=which, where=where, how="flip")
            state.break_one(which=3)
            state.teardown()


@pytest.mark.thorough
@pytest.mark.parametrize(("kv_bits", "accepted"), [(None, 1e-3), (16, 0.02), (8, 0.1), (4, 0.5)])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen4_exp"])
def test_any_order_of_requests_to_every_family(
    family: str, kv_bits: int | None, accepted: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"conversations-{family}"
    pack = synthetic_pack("tiny", replace(TINY, num_layers=4), folder, family=family).folder
    with flashmoe_mlx.load(pack, kv_bits=kv_bits, prompt_cache_gib=0.05) as engine:
        machine = type("Bound", (Conversations,), {"engine": engine, "pack": pack, "accepted": accepted})
        run_state_machine_as_test(machine, settings=settings(max_examples=8, stateful_step_count=12, deadline=None))


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_narrow_keys_and_values_continue(tiny_pack: Path, kv_bits: int) -> None:
    with flashmoe_mlx.load(tiny_pack, kv_bits=kv_bits) as engine:
        first = run(engine, begin(engine, list(range(1, 60)), max_tokens=8))
        prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
        capture = Capture()
        second = run(engine, begin(engine, prompt, max_tokens=1, processors=(capture,)))
        assert second.metrics.computed_tokens == 4
        # Other passes round other sums to these few bits.
        assert capture.first is not None
        assert np.abs(capture.first - engine.logits(prompt)[-1]).max() < 0.05


def test_memory_stays_within_the_budget(engine: Engine) -> None:
    random = np.random.default_rng(1)
    cache = engine.runner.prompt_cache = PromptCache(2**20, engine.model.state_bytes)
    sizes = []
    for _ in range(60):
        sequence = begin(engine, random.integers(1, 200, 20).tolist(), max_tokens=2)
        if random.random() < 0.3:
            sequence.cancel()
        run(engine, sequence) if not sequence.cancelled else sequence.finish("cancelled")
        sizes.append(cache.nbytes)
    assert max(sizes) <= 2**20
    assert engine.runner._ended == []


@pytest.mark.parametrize("damage", ["none", "keys and values", "state", "header", "missing", "other settings"])
@pytest.mark.sampled(3)
def test_conversations_outlast_the_process(tiny_pack: Path, tmp_path: Path, damage: str) -> None:
    def answer(prompt: list[int], **options: Any) -> tuple[Sequence, Logits]:
        capture = Capture()
        with flashmoe_mlx.load(tiny_pack, cache_dir=tmp_path / "cache", prompt_cache_gib=0.01, **options) as engine:
            sequence = run(engine, begin(engine, prompt, max_tokens=4, processors=(capture,)))
        assert capture.first is not None
        return sequence, capture.first

    first, _ = answer(list(range(1, 60)))
    prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    states = sorted((tmp_path / "cache").glob("*/*/*.safetensors"))
    keys = next((tmp_path / "cache").glob("*/*/kv.bin"))
    if damage == "keys and values":
        data = bytearray(keys.read_bytes())
        data[10] ^= 1
        keys.write_bytes(data)
    for state in states:
        data = bytearray(state.read_bytes())
        if damage == "state":
            data[-1] ^= 1
        elif damage == "header":
            data = data[:40]
        state.write_bytes(data)
    if damage == "missing":
        keys.unlink()
    options = {"experts_k": 2} if damage == "other settings" else {}
    second, logits = answer(prompt, **options)
    assert second.metrics.reused_from == ("disk" if damage == "none" else None)
    assert (second.metrics.computed_tokens == 4) == (damage == "none")
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0, **options) as engine:
        np.testing.assert_allclose(logits, engine.logits(prompt)[-1], atol=1e-3)


# Interrupted writes


class Killed(BaseException):
    """The end of a process in the middle of a write; no handler of errors catches it."""


def conversation(pack: Path, folder: Path, prompt: list[int]) -> Sequence:
    """Answer ``prompt`` in an engine that keeps conversations in ``folder`` only."""
    with flashmoe_mlx.load(pack, cache_dir=folder, prompt_cache_gib=0) as engine:
        return run(engine, begin(engine, prompt, max_tokens=4))


PHASES = ["nothing", "half of the keys", "keys and values", "state", "damaged state", "complete state"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.sampled(2)
def test_a_process_ends_in_the_middle_of_a_write(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    first = conversation(tiny_pack, tmp_path, list(range(1, 60)))
    prompt = [*first.request.prompt_ids, *first.token_ids, 7, 8, 9]
    replace, append = Path.replace, files.append

    def interrupted_append(file: Path, data: bytes) -> int:
        if phase == "nothing":
            raise Killed
        offset = append(file, data[: len(data) // 2] if phase == "half of the keys" else data)
        if "state" not in phase:
            raise Killed
        return offset

    def interrupted_replace(partial: Path, final: Path) -> Path:
        if phase == "damaged state":
            partial.write_bytes(partial.read_bytes()[:-20])
        if phase == "complete state":
            replace(partial, final)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", interrupted_append)
        patch.setattr(Path, "replace", interrupted_replace)
        with pytest.raises(Killed):
            conversation(tiny_pack, tmp_path, prompt)
    again = conversation(tiny_pack, tmp_path, prompt)
    assert again.metrics.reused_from == "disk"
    assert again.metrics.computed_tokens == (1 if phase == "complete state" else 4)
    assert conversation(tiny_pack, tmp_path, prompt).metrics.computed_tokens == 1
    assert not list(tmp_path.glob("*/*/partial*"))


@pytest.mark.parametrize("room", [0, 1000, 20_000, 60_000])
@pytest.mark.sampled(2)
def test_a_full_disk(tiny_pack: Path, tmp_path: Path, room: int) -> None:
    """No file may grow beyond ``room`` bytes, as on a disk without more."""
    first = conversation(tiny_pack, tmp_path, list(range(1, 60)))
    prompt = [*first.request.prompt_ids, *first.token_ids, *range(1, 90)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        full = conversation(tiny_pack, tmp_path, prompt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.finish_reason == "length"
    again = conversation(tiny_pack, tmp_path, prompt)
    assert again.token_ids == full.token_ids
    assert again.metrics.reused_from == "disk"
    assert conversation(tiny_pack, tmp_path, prompt).metrics.computed_tokens == 1


_LOOP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_prompt_cache import begin, flashmoe_mlx, run
with flashmoe_mlx.load(sys.argv[1], cache_dir=sys.argv[2], cache_dir_gib=0.001) as engine:
    print("ready", flush=True)
    for n in range(10**6):
        run(engine, begin(engine, [n % 200 + 1, *range(1, 40)], max_tokens=3))
"""


@pytest.mark.thorough
def test_processes_are_killed(tiny_pack: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for _ in range(6):
        command = [sys.executable, "-c", _LOOP, str(tiny_pack), str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.1, 1.0))
            os.kill(process.pid, signal.SIGKILL)
        with flashmoe_mlx.load(tiny_pack, cache_dir=tmp_path, prompt_cache_gib=0) as engine:
            assert engine.runner.prompt_cache is not None
            for segment in list(engine.runner.prompt_cache._tree.segments()):
                tokens = [token for part in segment.path() for token in part.tokens.tolist()]
                capture = Capture()
                sequence = run(engine, begin(engine, [*tokens, 5], max_tokens=1, processors=(capture,)))
                assert sequence.metrics.computed_tokens == 1
                assert capture.first is not None
                np.testing.assert_allclose(capture.first, engine.logits([*tokens, 5])[-1], atol=1e-3)
