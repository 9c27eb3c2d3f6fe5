"""Numeric options outside their range are refused in one line before any file is opened."""

import contextlib
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import get_class
from hypothesis import given
from hypothesis import strategies as st
from pack_oracle import assert_one_line
from systems import WHY_NO_IO_URING

import flashmoe_mlx
from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.contract import ExpertStore
from flashmoe_mlx.stores.limits import Limit
from flashmoe_mlx.stores.registry import backend_names, backend_settings, create_store
from flashmoe_mlx.testing.leaks import nothing_left_behind
from flashmoe_mlx.testing.stored_experts import StoredExperts, write_experts

# Outside the range of every option.
INVALID = [
    math.nan, math.inf, -math.inf, 0, -1, -(10**30), -0.5, 10**30, 1e300, 10**400, 10**5000,
    True, False, np.bool_(True), "4", "many", "", "x" * 100, [1], {}, 1j, b"1",
]  # fmt: skip


OPTIONS = [
    pytest.param(backend, option, id=f"{backend}.{option}")
    for backend in backend_names()
    for option in get_class(backend_settings(backend)["_target_"]).limits
    if (backend, option) != ("resident", "slots")
]


def test_every_numeric_option_has_a_limit() -> None:
    for backend in backend_names():
        store = get_class(backend_settings(backend)["_target_"])
        numeric = {
            name
            for name, parameter in inspect.signature(store).parameters.items()
            if any(word in str(parameter.annotation) for word in ("int", "float"))
        }
        assert numeric == set(store.limits) & set(inspect.signature(store).parameters), backend


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("packed"), bits=2, contiguous=True)


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> StoredExperts:
    return write_experts(tmp_path_factory.mktemp("scattered"), bits=4, contiguous=False)


@pytest.mark.parametrize(("backend", "option"), OPTIONS)
def test_invalid_values_by_name(
    backend: str, option: str, packed: StoredExperts, scattered: StoredExperts, tmp_path: Path
) -> None:
    stored = scattered if backend == "checkpoint" else packed
    settings = {key: value for key, value in backend_settings(backend).items() if key != "variant"}
    with nothing_left_behind(tmp_path):
        for value in INVALID:
            with pytest.raises(InputError) as caught:
                create_store(stored.source, settings | {option: value})
            assert_refused(caught.value, option)


@pytest.mark.parametrize(("backend", "option"), OPTIONS)
def test_invalid_values_from_python(
    backend: str, option: str, packed: StoredExperts, scattered: StoredExperts, tmp_path: Path
) -> None:
    """The constructors check their options too."""
    if backend == "io_uring" and WHY_NO_IO_URING:
        pytest.skip(WHY_NO_IO_URING)
    stored = scattered if backend == "checkpoint" else packed
    store: type[ExpertStore] = get_class(backend_settings(backend)["_target_"])
    small: dict[str, Any] = {"budget_gib": 0.001} if backend == "ram_hybrid" else {}
    with nothing_left_behind(tmp_path):
        for value in INVALID:
            with pytest.raises(InputError) as caught:
                store(stored.source, **small | {option: value})
            assert_refused(caught.value, option)


def assert_refused(error: InputError, option: str) -> None:
    assert (error.code, error.exit_code) == ("option_out_of_range", 2)
    assert_one_line(error)
    text = str(error)
    assert text.startswith(f"backend.{option}=")
    assert "from" in text or "greater than" in text
    assert len(text) < 200


def test_depth_is_limited_by_threads_without_io_uring(packed: StoredExperts) -> None:
    settings = {"_target_": "flashmoe_mlx.backends.resident.ResidentStore", "depth": 1025}
    with pytest.raises(InputError) as caught:
        create_store(packed.source, settings)
    assert_refused(caught.value, "depth")


@given(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none(), st.lists(st.integers())),
    st.booleans(),
    st.booleans(),
)
def test_a_limit_accepts_or_refuses_any_value(value: Any, integer: bool, exclusive: bool) -> None:
    limit = Limit(2, 9, integer=integer, exclusive=exclusive)
    inside = type(value) is int or (type(value) is float and not integer)
    inside = inside and (value > 2 if exclusive else value >= 2) and value <= 9
    with contextlib.nullcontext() if inside else pytest.raises(InputError) as caught:
        limit.check("some", value)
    if not inside:
        assert caught.value.code == "option_out_of_range"
        assert_one_line(caught.value)


@pytest.mark.parametrize("backend", [["pread", "mmap"], None, 3, True])
def test_a_backend_that_is_neither_a_name_nor_a_mapping(tiny_pack: Path, backend: Any) -> None:
    with pytest.raises(InputError) as caught:
        flashmoe_mlx.load(tiny_pack, backend)
    assert caught.value.code == "unknown_backend"
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["backend.chunk_mib=nan"],
        ["backend.threads=100000"],
        ["backend=io_uring", "backend.depth=-3"],
        ["backend=ram_hybrid", "backend.budget_gib=1e9"],
    ],
)
@pytest.mark.sampled(2)
def test_from_the_command_line(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashmoe_mlx", "prompt=hi", "max_tokens=1", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert arguments[-1].partition("=")[0] in lines[0]
    assert "internal error" not in lines[0]
