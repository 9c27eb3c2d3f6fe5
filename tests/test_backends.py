"""All backends produce the same tokens, and each has a module, a YAML file, and checked options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pack_oracle import assert_one_line
from systems import WHY_NO_IO_URING, needs_io_uring
from tiny_checkpoints import GEOMETRIES, write_checkpoint

import flashmoe_mlx
from flashmoe_mlx.backends import __path__ as backends_path
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.pack.writer import pack_checkpoint
from flashmoe_mlx.stores.registry import backend_names, backend_settings

BUDGET = {"ram_hybrid": {"budget_gib": 0.0005}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", GEOMETRIES["wide"], 0, "mlx4", shards=2)


@pytest.fixture(scope="module")
def pack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_checkpoint(checkpoint, tmp_path_factory.mktemp("pack"), [4, 2], group_size=32).folder


def backends_except(excluded: str) -> list[Any]:
    """Return the names of all backends except ``excluded``, with a mark on io_uring."""
    names = [name for name in backend_names() if name != excluded]
    return [pytest.param(name, marks=needs_io_uring) if name == "io_uring" else name for name in names]


def tokens(folder: Path, backend: str, **options: Any) -> tuple[list[int], list[bytes]]:
    """Return the greedy tokens after a prompt and the bytes of all logits."""
    chosen, seen = [], []
    with flashmoe_mlx.load(folder, backend, 3, **BUDGET.get(backend, {}), **options) as engine:
        cache = engine.new_cache()
        logits = engine.forward([5, 17, 42, 8, 3, 99, 23], cache)
        for _ in range(12):
            seen.append(logits.tobytes())
            chosen.append(int(logits[-1].argmax()))
            logits = engine.forward([chosen[-1]], cache)
    return chosen, seen


@pytest.fixture(scope="module")
def expected_q4(pack: Path) -> tuple[list[int], list[bytes]]:
    return tokens(pack, "pread")


@pytest.fixture(scope="module")
def expected_q2(pack: Path) -> tuple[list[int], list[bytes]]:
    return tokens(pack, "pread", variant="q2")


@pytest.mark.parametrize("backend", backends_except("pack2"))
def test_all_backends_generate_the_same_tokens(
    backend: str, pack: Path, checkpoint: Path, expected_q4: tuple[list[int], list[bytes]]
) -> None:
    folder = checkpoint if backend == "checkpoint" else pack
    assert tokens(folder, backend) == expected_q4
    assert len(set(expected_q4[0])) > 3


@pytest.mark.parametrize("backend", backends_except("checkpoint"))
def test_all_backends_generate_the_same_tokens_from_2_bits(
    backend: str, pack: Path, expected_q2: tuple[list[int], list[bytes]], expected_q4: tuple[list[int], list[bytes]]
) -> None:
    named = {} if backend == "pack2" else {"variant": "q2"}
    assert tokens(pack, backend, **named) == expected_q2
    assert expected_q2[1] != expected_q4[1]


@pytest.mark.parametrize("backend", backends_except(""))
@pytest.mark.sampled(4)
def test_sequences_decoded_together_have_the_tokens_that_each_has_alone(
    backend: str, pack: Path, checkpoint: Path
) -> None:
    folder = checkpoint if backend == "checkpoint" else pack
    prompts = ([5, 17, 42, 8, 3, 99, 23], [64, 12], list(range(1, 40)))
    with flashmoe_mlx.load(folder, backend, 3, **BUDGET.get(backend, {})) as engine:
        runner = engine.runner

        def answers(prompts: Sequence[list[int]]) -> list[list[int]]:
            sequences = [runner.begin(Request(prompt, ChosenSampling(SamplingOptions()), 12)) for prompt in prompts]
            with runner.exclusive():
                for sequence in sequences:
                    runner.prefill(sequence)
                while all(sequence.finish_reason is None for sequence in sequences):
                    runner.decode(sequences)
            return [sequence.token_ids for sequence in sequences]

        assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_each_backend_has_a_module_and_a_yaml_file() -> None:
    modules = {path.stem for folder in backends_path for path in Path(folder).glob("*.py")} - {"__init__"}
    assert modules == set(backend_names())
    for name in backend_names():
        assert backend_settings(name)["_target_"].startswith(f"flashmoe_mlx.backends.{name}.")


def test_an_unknown_backend(pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(pack, "nosuch")
    assert caught.value.code == "unknown_backend"
    assert all(name in str(caught.value) for name in backend_names())


def test_pack2_refuses_4_bits(pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(pack, "pack2", variant="q4")
    assert caught.value.code == "wrong_width"
    assert_one_line(caught.value)


def test_pack2_without_a_2_bit_variant(tiny_pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(tiny_pack, "pack2")
    assert caught.value.code == "unknown_variant"
    assert "task=pack source=" in str(caught.value)
    assert "bits=[2]" in str(caught.value)


def test_checkpoint_refuses_a_pack(pack: Path) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(pack, "checkpoint")
    assert caught.value.code == "not_a_checkpoint"
    assert_one_line(caught.value)


def test_every_option_of_a_yaml_file_is_an_option_of_the_store(pack: Path, checkpoint: Path) -> None:
    for name in backend_names():
        if name == "io_uring" and WHY_NO_IO_URING:
            continue
        options = {key: value for key, value in backend_settings(name).items() if key != "_target_"}
        options |= BUDGET.get(name, {})
        flashmoe_mlx.load(checkpoint if name == "checkpoint" else pack, name, **options).close()
