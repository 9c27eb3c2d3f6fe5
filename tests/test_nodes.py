"""Experts shared by several processes, which MLX connects in a ring: the same logits and tokens as in one process."""

import json
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import node_program
import node_restart
import numpy as np
import numpy.typing as npt
import pytest
import ring
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

import flashmoe_mlx
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.shares import Share, owners
from flashmoe_mlx.pack.opening import open_pack
from flashmoe_mlx.pack.shard import copy_share

TOLERANCE = 1e-4
"""Of the largest logit: nodes add the outputs of experts in another order."""
TWO: list[dict[str, Any]] = [
    {"backend": "io_uring", "experts_k": 16, "slots": 5, "weights": [1, 3], "pack": "share-{rank}"},
    {"gpu": True, "backend": "resident", "weights": [1, 4]},
    {"experts_k": 1, "prompt_cache_gib": 0.01},
    {"differs": {"experts_k": 2}},
]
MORE: list[dict[str, Any]] = [
    {"backend": "ram_hybrid", "budget_gib": 0.001, "weights": [5, 2], "prefetch": "next_router"},
    {"backend": "resident", "weights": [1, 1000]},
    {"backend": "ram_hybrid", "budget_gib": 0.01, "preload": True, "slots": 16, "experts_k": 3},
    {"kernels": "mlx", "prompt_cache_gib": 0.01},
    {"differs": {"kernels": "mlx"}},
    {"differs": {"kv_bits": 8}},
]
THREE: list[dict[str, Any]] = [
    {"weights": [1, 2, 4]},
    {"backend": "mmap", "experts_k": 2},
    {"backend": "pread", "threads": 2, "experts_k": 7},
    {"backend": "resident", "kernels": "reference"},
]


def run_cases(count: int, cases: list[dict[str, Any]], pack: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Run ``cases`` on ``count`` nodes; return what each node saved for each case. ``pack`` names copies of shares."""
    for case in cases:
        if "pack" in case:
            for node in range(count):
                share = Share(node, tuple(map(float, case["weights"])))
                copy_share(open_pack(pack), folder / case["pack"].replace("{rank}", str(node)), share)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [str(ring.PROGRAM), str(pack), str(folder), str(folder / "cases.json")]
    for code, out, errors in ring.run(count, command, folder):
        assert (code, out) == (0, ""), errors
    return [
        [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(count)]
        for case in range(len(cases))
    ]


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, TWO),
        pytest.param(2, MORE, marks=pytest.mark.nightly),
        pytest.param(3, THREE, marks=pytest.mark.thorough),
    ],
)
def test_nodes_compute_what_one_process_computes(
    count: int, cases: list[dict[str, Any]], tiny_pack: Path, tmp_path: Path
) -> None:
    saved = run_cases(count, cases, tiny_pack, tmp_path)
    for number, (case, results) in enumerate(zip(cases, saved, strict=True)):
        if "differs" in case:
            (name,) = case["differs"]
            assert {result["code"] for result in results} == {"node_mismatch"}
            assert all("node 1 differs from node 0" in result["error"] for result in results)
            assert all(name.removesuffix("s") in result["error"] for result in results)
            continue
        options = {name: value for name, value in case.items() if name not in ("weights", "gpu", "pack")}
        requests: Counter[int] = Counter()
        weights = case.get("weights", [1] * count)

        def observe(
            layer: int, experts: npt.NDArray[np.uint32], counted: Counter[int] = requests, weights: Any = weights
        ) -> None:
            owned_by = owners(weights, layer, TINY.num_experts)
            counted.update(int(owned_by[expert]) for expert in np.unique(experts))

        with flashmoe_mlx.load(tiny_pack, **options) as engine:
            engine.observe_routing(observe)
            expected = node_program.logits(engine)
            observed = requests.copy()
            engine.observe_routing(None)
            tokens = node_program.answers(engine)
            record_bytes = engine.store.layout.record_bytes
        assert results[0]["tokens"] == tokens, case
        logits = np.load(tmp_path / f"{number}.npy")
        assert np.abs(logits - expected).max() < TOLERANCE * np.abs(expected).max(), case
        assert (logits.argmax(-1) == expected.argmax(-1)).all()
        if case.get("backend", "pread") == "pread" and "prompt_cache_gib" not in case:
            assert sum(result["requests"] for result in results) > sum(observed.values())
            for result in results:
                assert result["bytes_read"] == result["requests"] * record_bytes


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), st.integers(0, 90), st.integers(1, 600))
def test_every_expert_has_one_owner(weights: list[float], layer: int, experts: int) -> None:
    shares = [Share(node, tuple(weights)) for node in range(len(weights))]
    owned = [share.experts(layer, experts) for share in shares]
    assert sorted(expert for own in owned for expert in own) == list(range(experts))
    more = owners([*weights, 1.0], layer, experts)
    same = owners(weights, layer, experts)
    assert ((more == same) | (more == len(weights))).all()  # a new node takes experts, and no other expert moves


def test_shares_follow_the_weights() -> None:
    counted = Counter(int(owner) for layer in range(60) for owner in owners((1.0, 2.0, 5.0), layer, 512))
    total = sum(counted.values())
    for node, part in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert counted[node] / total == pytest.approx(part, abs=0.01)
    assert owners((1, 3), 7, 8).tolist() == owners((2, 6), 7, 8).tolist()


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, float("nan")), (1.0, -1.0), (1.0, float("inf"))])
def test_weights_are_checked(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"nodes\.weights"):
        Share(0, weights)


EVERYDAY = {("decode", "SIGKILL", 1), ("prefill", "SIGSTOP", 0)}
THOROUGH = {("load", "SIGKILL", 0), ("load", "SIGSTOP", 1), ("decode", "SIGSTOP", 0), ("idle", "SIGKILL", 1)}


def _marks(fault: tuple[str, str, int]) -> list[pytest.MarkDecorator]:
    return [] if fault in EVERYDAY else [pytest.mark.thorough if fault in THOROUGH else pytest.mark.nightly]


FAULTS = [
    pytest.param(phase, name, victim, marks=_marks((phase, name, victim)))
    for phase in ("load", "prefill", "decode", "idle")
    for name in ("SIGKILL", "SIGSTOP")
    for victim in (0, 1)
]


@pytest.mark.parametrize(("phase", "name", "victim"), FAULTS)
def test_a_node_ends_if_another_one_is_gone(
    phase: str, name: str, victim: int, tiny_pack: Path, tmp_path: Path
) -> None:
    program = Path(__file__).with_name("node_fault.py")
    nodes = ring.start(2, [str(program), str(tiny_pack), phase, name, str(victim)], tmp_path)
    try:
        _, errors = nodes[1 - victim].communicate(timeout=60)
        assert nodes[1 - victim].returncode == 1, errors
        lines = [line for line in errors.splitlines() if line.startswith("flashmoe_mlx: ")]
        assert len(lines) == 1, errors
        expected = "was lost" if name == "SIGKILL" else "no answer from another node for 1.5 s"
        assert expected in lines[0]
    finally:
        for node in nodes:
            node.kill()
            node.communicate()


def test_a_restart_continues_from_the_disk(tiny_pack: Path, tmp_path: Path) -> None:
    """After the loss of a node in a request, the group computes only the new tokens of an earlier conversation."""
    program = [str(Path(__file__).with_name("node_restart.py")), str(tiny_pack), str(tmp_path)]
    ring.run(2, [*program, "loses"], tmp_path)
    lost = json.loads((tmp_path / "lost.json").read_text())
    assert lost["code"] == "node_lost"
    for code, _, errors in ring.run(2, [*program, "restarts"], tmp_path):
        assert code == 0, errors
    restarted = json.loads((tmp_path / "restarted.json").read_text())
    prompt = [*node_restart.PROMPT, *lost["first"], *node_restart.MORE]
    assert restarted["reused"] == len(prompt) - len(node_restart.MORE) - 1  # the state is that before the latest token
    with flashmoe_mlx.load(tiny_pack, prompt_cache_gib=0) as engine:
        assert node_restart.answer(engine, node_restart.PROMPT)[0] == lost["first"]
        assert node_restart.answer(engine, prompt)[0] == restarted["again"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_node_0_serves_and_reports_a_lost_node(name: str, tiny_pack: Path, tmp_path: Path) -> None:
    httpx2 = pytest.importorskip("httpx2")
    with flashmoe_mlx.load(tiny_pack) as engine:
        request = {"raw": True, "max_tokens": 24}
        expected = "".join(piece.text for piece in engine.generate("abcdefgh", **request))
    options = ["task=serve", f"model.path={tiny_pack}", "server.port=0", "nodes.timeout=3", "prompt_cache_gib=0.01"]
    command = ["-m", "flashmoe_mlx", *options, "hydra.run.dir=run-{rank}"]
    nodes = ring.start(2, command, tmp_path, FLASHMOE_INSTRUCTIONS="auto")
    try:
        assert nodes[0].stderr is not None
        first = nodes[0].stderr.readline()
        while "listening on " not in first:
            first = nodes[0].stderr.readline()
        with httpx2.Client(base_url=first.partition("listening on ")[2].strip(), timeout=60) as client:
            body = {"model": "any", "prompt": "abcdefgh", "max_tokens": 24, "temperature": 0}
            deadline = time.monotonic() + 60
            while (answer := client.post("/v1/completions", json=body)).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected
            endless = {**body, "max_tokens": 200, "min_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json=endless) as stream:
                next(stream.iter_lines())  # then the client leaves
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            with client.stream("POST", "/v1/completions", json=endless) as stream:
                lines = stream.iter_lines()
                next(lines)
                nodes[1].send_signal(signal.Signals[name])
                rest: list[str] = []
                with suppress(httpx2.RemoteProtocolError):  # the server ends a failed stream without its last part
                    for line in lines:
                        rest.append(line)  # noqa: PERF402  # the lines before the end
            assert any("node_lost" in line or "node_timeout" in line for line in rest), rest[-3:]
        _, errors = nodes[0].communicate(timeout=30)
        assert nodes[0].returncode == 1
        assert "flashmoe_mlx: " in errors
        assert json.loads((tmp_path / "run-0" / "failure.json").read_text())["code"] in ("node_lost", "node_timeout")
    finally:
        for node in nodes:
            node.kill()
            node.communicate()
